"""What the causality checks report: the first leaking pair, the module, the path, and the likely bug."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import (
    PartedTransformer,
    alibi,
    changed,
    no_positions,
    parted,
    sinusoidal,
    sliding_window,
)
from transformer_checks.checks.check_gradients import check_rows_get_their_own_gradient
from transformer_checks.checks.probes.documents import partings, undivided
from transformer_checks.checks.probes.influence import Changes, call, changes, every_id
from transformer_checks.checks.probes.leak_search import LeakSearch, moves_before
from transformer_checks.checks.probes.leaks import pattern
from transformer_checks.checks.probes.windows import declared_windows
from transformer_checks.checks.reference import reference, reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.checks.watch.arithmetic import same_arithmetic
from transformer_checks.checks.ways import TRAIN
from transformer_checks.transformer.model import Block

CHECKS = {check.__name__: check for theme in ("causality", "positions") for check in checks_in(theme)}
BUGS = all_bugs()
PAST = "check_future_cannot_change_past"

# bug → the check that finds it, the first leaking pair (t, s), the module, the first likely bug
LEAKS = {
    "no-causal-mask": (PAST, (0, 1), "blocks.0.attention", "no-causal-mask"),
    "one-position-leaks": (PAST, (5, 6), "blocks.0.attention", "one-position-leaks"),
    "mask-fill-not-negative-enough": (PAST, (0, 1), "blocks.0.attention", "mask-fill-not-negative-enough"),
    "causal-mask-wrong-in-some-layers": (PAST, (0, 1), "blocks.0.attention", "causal-mask-wrong-in-some-layers"),
    "last-layer-unmasked": (PAST, (0, 1), "blocks.1.attention", "causal-mask-wrong-in-some-layers"),
    "causal-mask-dropped-on-a-branch": (
        f"{PAST}_in_training", (0, 1), "blocks.0.attention", "causal-mask-dropped-on-a-branch",
    ),
    "block-summary-leak": (PAST, (0, 1), "blocks.0.attention", "block-summary-leak"),
    "causal-sees-one-future": (PAST, (0, 1), "blocks.0.attention", "causal-sees-one-future"),
    "softmax-over-queries": (PAST, (0, 1), "blocks.0.attention", "softmax-over-queries"),
    "look-ahead-shift": (PAST, (0, 1), "blocks.0", "look-ahead-shift"),
    "pad-mask-replaces-causal": (f"{PAST}_under_a_mask", (0, 1), "blocks.0.attention", "pad-mask-replaces-causal"),
}  # fmt: skip


def verdict(check: str, bug: str, seed: int = 3):
    return judge(CHECKS[check], BUGS[bug].subject(seed=seed), {})


@pytest.mark.parametrize("bug", LEAKS)
def test_a_leak_is_told_by_its_first_pair_and_its_module(bug):
    check, (t, s), module, likely = LEAKS[bug]
    found = verdict(check, bug)
    assert found.outcome == "failed", found.says
    assert found.evidence["first"] == {"t": t, "s": s}
    assert f"position {t} sees the future" in found.says and f"token {s} " in found.says
    assert found.where is not None and found.where.module == module
    assert found.where.file.endswith(".py") and found.where.line > 0
    assert found.likely[0] == likely


def test_the_number_of_leaking_pairs_is_told():
    assert "78 of 78 pairs" in verdict(PAST, "no-causal-mask").says
    assert "1 of 78 pairs" in verdict(PAST, "one-position-leaks").says


def test_the_path_on_which_it_leaks_is_told():
    assert "in train mode with dropout 0.2" in verdict(f"{PAST}_in_training", "causal-mask-dropped-with-dropout").says
    assert "bfloat16" in verdict(f"{PAST}_in_low_precision", "mask-fill-weak-in-half-precision").says
    assert "no fused attention" in verdict(
        f"{PAST}_by_another_attention", "causal-mask-only-in-the-fused-path"
    ).says  # fmt: skip
    assert "key-value cache" in verdict(f"{PAST}_into_a_cache", "first-read-into-a-cache-sees-one-more").says


def test_what_attention_was_seen_to_do_is_told():
    assert "Masked scores are -10," in verdict(PAST, "mask-fill-not-negative-enough").says
    assert "axis -2" in verdict(PAST, "softmax-over-queries").says
    assert "looks at the past only" in verdict(PAST, "block-summary-leak").says
    assert "without is_causal" in verdict(f"{PAST}_in_training", "causal-mask-dropped-with-dropout").says


def test_leaks_beyond_the_first_positions_are_found():
    found = verdict(f"{PAST}_in_long_sequences", "causal-hardcoded-length")
    assert found.outcome == "failed" and found.evidence["length"] == 131
    assert verdict(PAST, "causal-hardcoded-length").outcome == "passed"  # all is well up to 13 tokens


def test_a_passing_check_keeps_the_influence_map():
    """Row t, column s: 0 above the diagonal, something below."""
    found = judge(CHECKS[PAST], reference(seed=1), {})
    influence = torch.tensor(found.evidence["influence"])
    assert influence.shape == (13, 13)
    assert not influence.triu(1).any()
    assert (influence.tril() > 0).sum() == 13 * 14 // 2


# -- leaks that are no known bug: each would escape a search that leaves out one condition


class Leaky(nn.Module):
    """A causal mean of the past that, under a condition, also sees the last token."""

    def __init__(self, vocab_size=17, n_embd=32, condition=lambda model, tokens: True, **sizes):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)
        self.condition = condition

    def forward(self, tokens, mask=None):
        x = self.embedding(tokens)
        past = x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]
        leaks = torch.as_tensor(self.condition(self, tokens))
        leaks = leaks.expand(tokens.shape) if leaks.dim() < 2 else leaks
        return self.head(torch.tanh(past + x) + torch.where(leaks[..., None], x[:, -1:], 0.0))


def leaky(condition) -> Subject:
    parts = reference_parts()
    parts.build_model = lambda **sizes: Leaky(condition=condition, **sizes)
    return Subject("leaky", parts, seed=5)


CONDITIONS = {
    "always": lambda model, x: True,
    "at even lengths": lambda model, x: x.shape[1] % 2 == 0,
    "from eight tokens on": lambda model, x: x.shape[1] >= 8,
    "at two tokens only": lambda model, x: x.shape[1] == 2,
    "in batches of one row": lambda model, x: len(x) == 1,
    "in batches of several rows": lambda model, x: len(x) > 1,
    "past the first row": lambda model, x: torch.arange(len(x))[:, None] > torch.zeros_like(x),
    "where symbol 11 stands": lambda model, x: x == 11,
    "where symbol 4 is first": lambda model, x: (x[:, :1] == 4).expand_as(x),
    "where the last symbol is 7": lambda model, x: (x[:, -1:] == 7).expand_as(x),
    "at the last position but one": lambda model, x: torch.arange(x.shape[1]).expand_as(x) == x.shape[1] - 2,
    "at position 9": lambda model, x: torch.arange(x.shape[1]).expand_as(x) == 9,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_leak_under_a_condition_is_found(condition):
    found = judge(CHECKS[PAST], leaky(CONDITIONS[condition]), {})
    assert found.outcome == "failed", found.says


def test_a_leak_in_training_alone_is_found():
    found = judge(CHECKS[f"{PAST}_in_training"], leaky(lambda model, x: model.training), {})
    assert found.outcome == "failed" and "in train mode" in found.says


@pytest.mark.parametrize("mix", ["flipped", "circular", "normed over time", "batch norm"])
def test_other_ways_of_mixing_time_are_found(mix):
    """A reversal, a convolution padded in a circle, a norm over the sequence."""

    class Mixed(Leaky):
        def forward(self, tokens, mask=None):
            x = self.embedding(tokens)
            if mix == "flipped":
                x = x + x.flip(1)
            elif mix == "circular":
                x = x + x.roll(1, dims=1)
            elif mix == "normed over time":
                x = F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2)
            else:
                x = F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)
            return self.head(x)

    parts = reference_parts()
    parts.build_model = lambda **sizes: Mixed(**sizes)
    assert judge(CHECKS[PAST], Subject("mixed", parts), {}).outcome == "failed"


def test_another_row_is_no_future():
    """A leak between rows is for the checks of rows to report: causality must not fail."""

    class Coupled(Leaky):
        def forward(self, tokens, mask=None):
            x = self.embedding(tokens)
            return self.head(x.cumsum(dim=1) + x[:1].mean(dim=1, keepdim=True) * (len(tokens) > 1))

    class Averaged(Leaky):
        def forward(self, tokens, mask=None):
            x = self.embedding(tokens)
            return self.head(x.cumsum(dim=1) + x.mean(dim=0, keepdim=True).cumsum(dim=1))

    for kind, outcome in ((Averaged, "passed"), (Coupled, "failed")):  # in the second, row 0 sees its own future
        parts = reference_parts()
        parts.build_model = lambda kind=kind, **sizes: kind(**sizes)
        assert judge(CHECKS[PAST], Subject("coupled", parts), {}).outcome == outcome, kind


def test_rounding_after_routing_is_no_leak():
    """Experts multiply as many tokens as chose them: another token's choice rounds differently and proves nothing."""

    class Routed(nn.Module):
        def __init__(self, vocab_size=17, n_embd=32, **sizes):
            super().__init__()
            self.embedding, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)
            self.experts = nn.ModuleList(nn.Linear(n_embd, n_embd) for _ in range(3))

        def forward(self, tokens, mask=None):
            x = self.embedding(tokens).cumsum(dim=1)
            choice, out = x[..., :3].argmax(dim=-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                out[choice == index] = expert(x[choice == index])
            return self.head(out)

    parts = reference_parts()
    parts.build_model = lambda **sizes: Routed(**sizes)
    for seed in range(5):
        found = judge(CHECKS[PAST], Subject("routed", parts, seed=seed), {})
        assert found.outcome == "passed", found.says


def test_expert_choice_is_a_leak():
    """Experts that choose their tokens from the whole row let a later token push an earlier one out."""

    class Chosen(Leaky):
        def forward(self, tokens, mask=None):
            x = self.embedding(tokens).cumsum(dim=1)
            best = x[..., 0].topk((tokens.shape[1] + 1) // 2, dim=1).indices
            return self.head(x + torch.zeros_like(x).scatter(1, best[..., None].expand(-1, -1, x.shape[-1]), 1.0))

    parts = reference_parts()
    parts.build_model = lambda **sizes: Chosen(**sizes)
    assert judge(CHECKS[PAST], Subject("chosen", parts), {}).outcome == "failed"


# -- what is not a leak


def test_an_encoder_that_says_so_is_not_accused():
    subject = BUGS["no-causal-mask"].subject(causal=False)
    assert judge(CHECKS[PAST], subject, {}).outcome == "not_applicable"


@pytest.mark.parametrize("variant", [sliding_window, alibi, no_positions, sinusoidal])
def test_legitimate_designs_pass(variant):
    subject = Subject(variant.__name__, variant(), seed=11)
    for check in CHECKS.values():
        found = judge(check, subject, {})
        assert found.outcome in ("passed", "not_applicable"), f"{check_id(check)}: {found.says}"


def test_no_positions_are_reported_and_not_failed():
    found = judge(CHECKS["check_order_of_tokens_matters"], Subject("nope", no_positions()), {})
    assert found.outcome == "passed" and "NoPE" in found.remarks[0]


@pytest.mark.parametrize("name", ["sliding_window_pattern", "max_window_layers", "window_every"])
def test_which_layers_have_a_window_is_no_window(name):
    model = reference().build()
    model.config = SimpleNamespace(**{name: 4, "sliding_window": 6})
    assert list(declared_windows(model).values()) == [6]


def test_a_window_is_told_by_what_it_shows():
    found = verdict("check_one_block_sees_its_window", "window-ignored")
    assert found.evidence["window"] == 4 and found.evidence["first"] == {"t": 4, "s": 0}
    assert "window of 4" in found.says and "sees 13 tokens" in found.says
    assert "sees 3 tokens" in verdict("check_one_block_sees_its_window", "window-off-by-one").says
    found = verdict("check_one_block_sees_its_window", "window-off-by-one-in-one-layer")
    assert "blocks.1 alone sees 5 tokens, expected 4" in found.says and found.where.module == "blocks.1"


def test_a_past_that_is_not_read_is_told_by_its_first_pair():
    found = verdict("check_past_reaches_every_later_position", "first-token-never-seen")
    assert found.evidence["first"] == {"t": 1, "s": 0} and "12 of 91" in found.says
    found = verdict("check_past_reaches_every_later_position", "attention-sees-itself-only")
    assert "no earlier token is read" in found.says


def test_an_embedding_that_is_scaled_in_place_is_read_as_any_other():
    def scale(model):
        model.embedding.register_forward_hook(lambda module, given, out: out.mul_(2.0))

    subject = Subject("scaled in place", changed(scale), seed=3)
    for check in (CHECKS["check_later_tokens_get_no_gradient"], check_rows_get_their_own_gradient):
        found = judge(check, subject, {})
        assert found.outcome == "passed", found.says


def test_a_prefix_is_told_by_its_length():
    found = verdict("check_prefix_gives_the_same_logits", "position-reversed")
    assert "the first 1 of 13 tokens" in found.says and found.likely[0] == "position-reversed"


def test_positions_that_look_the_same_are_named():
    found = verdict("check_order_of_tokens_matters", "positions-start-again")
    assert found.evidence["first"] == {"a": 0, "b": 8} and found.likely[0] == "positions-start-again"
    found = verdict("check_order_of_tokens_matters", "position-constant")
    assert "order has no effect" in found.says
    assert set(found.likely[:2]) == {"position-constant", "position-not-added"}


def test_a_rotation_that_is_not_relative_is_told_by_its_drift():
    found = verdict("check_rotary_angle_depends_on_distance", "rope-opposite-signs")
    assert "not relative" in found.says and "rope-opposite-signs" in found.likely
    assert min(found.evidence["drift"].values()) > 1e-2


# -- the machinery


def test_every_id_stands_everywhere_once():
    tokens = every_id(reference(), 13, seed=4)
    assert tokens.shape == (17, 13)
    assert all(sorted(column.tolist()) == list(range(17)) for column in tokens.T)


def test_changes_replace_one_real_token():
    subject = reference()
    tokens = subject.tokens(3, 5)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 4 + [True]])
    tried = changes(subject, tokens, mask)
    assert len(tried.place) == (5 + 3 + 1) * 2
    assert (tried.plain != tried.changed).sum(dim=1).tolist() == [1] * len(tried.place)
    assert tried.mask is not None and bool(tried.mask[torch.arange(len(tried.place)), tried.place].all())
    assert not (tried.judged() & ~tried.mask).any()


def test_a_leak_of_a_batch_is_not_confirmed_alone():
    subject = leaky(lambda model, x: len(x) > 1)
    model = subject.amplified()
    leak, _ = LeakSearch(subject, model, changes(subject, subject.tokens(4, 6))).find()
    assert leak is not None and len(leak.tried.place) > 1
    assert LeakSearch(subject, model, changes(subject, subject.tokens(1, 6)), alone=True).find()[0] is None


def test_a_rewritten_future_counts_as_one_change():
    subject = leaky(lambda model, x: True)
    tokens = subject.tokens(2, 6)
    rewritten = torch.cat((tokens[:, :3], (tokens[:, 3:] + 1) % 17), dim=1)
    leak, _ = LeakSearch(subject, subject.amplified(), Changes(tokens, rewritten, torch.tensor([3, 3]))).find()
    assert leak is not None and (leak.t, leak.s) == (0, 3)


def test_dropout_is_drawn_alike_and_the_mode_put_back():
    subject = reference()
    model, tokens = subject.amplified(dropout=0.3), subject.tokens(2, 6)
    assert torch.equal(call(subject, model, tokens, way=TRAIN), call(subject, model, tokens, way=TRAIN))
    assert not torch.equal(call(subject, model, tokens, way=TRAIN), call(subject, model, tokens))
    assert not model.training


def test_chance_from_python_is_drawn_alike_too():
    """Blocks that are skipped by `random.random()`, as in x-transformers, are no leak."""

    class Skipping(Block):
        def forward(self, x, *rest):
            return x if self.training and random.random() < 0.5 else super().forward(x, *rest)

    subject = reference()
    model, tokens = subject.amplified(n_layer=1), subject.tokens(2, 6)
    model.blocks[0].__class__ = Skipping
    drawn = {call(subject, model, tokens, way=TRAIN).sum().item() for _ in range(8)}
    assert len(drawn) == 1


def test_time_is_the_axis_as_long_as_the_sequence():
    breaks = moves_before(3, 5)
    one = torch.zeros(1, 5, 4)
    early, late = one.clone(), one.clone()
    early[0, 2], late[0, 3] = 1, 1
    assert breaks(one, early) and not breaks(one, late)
    assert not breaks(torch.zeros(2, 4), torch.ones(2, 4))  # no axis of time
    assert not breaks(one.transpose(1, 2), late.transpose(1, 2))


def test_arithmetic_is_the_same_where_operations_and_shapes_are():
    x = torch.randn(4, 4)
    y = torch.randn(4, 4)
    assert same_arithmetic(lambda: x @ x, lambda: y @ y)
    assert not same_arithmetic(lambda: x @ x, lambda: (x + 1) @ x)
    assert not same_arithmetic(lambda: x @ x, lambda: x[:2] @ x)
    assert not same_arithmetic(lambda: x.topk(2), lambda: x.topk(2))
    assert not same_arithmetic(lambda: torch.fft.rfft(x), lambda: torch.fft.rfft(x))


def test_a_pattern_names_its_bug():
    past, T = torch.ones(8, 8, dtype=torch.float64), 8

    def first(pairs):
        return pattern(pairs.double(), past)[0]

    upper = torch.ones(T, T).triu(1)
    assert first(upper) == "no-causal-mask"
    assert first(upper * 1e-4) == "mask-fill-not-negative-enough"
    assert first(upper.tril(1)) == "causal-sees-one-future"
    assert first(upper * (torch.arange(T) == 0)[:, None]) == "causal-excludes-self"
    assert first(upper * (torch.arange(T)[:, None] // 4 == torch.arange(T) // 4)) == "block-summary-leak"
    assert first(upper * (torch.arange(T) >= 5)) == "causal-hardcoded-length"
    assert first(upper.tril(4)) == "window-to-both-sides"


def test_noise_of_as_many_tokens_as_chose_an_expert_is_no_sight_of_the_future():
    """The dropout of one expert draws for its own tokens: another choice gives every later expert other noise."""

    def change(model):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                width = model.config.n_embd
                self.router = nn.Linear(width, 3)
                dropped = nn.Dropout(model.config.dropout)
                self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), dropped) for _ in range(3))

            def forward(self, x):
                weight, chosen = self.router(x).softmax(-1).max(-1)
                mixed = torch.zeros_like(x)
                for index, expert in enumerate(self.experts):
                    mixed[chosen == index] = expert(x[chosen == index])
                return weight[..., None] * mixed

        for block in model.blocks:
            block.feed_forward = Experts()

    subject = Subject("experts that drop", changed(change), seed=2)
    model = subject.amplified(dropout=0.2)
    tokens = subject.tokens(2, 9)
    first, second = (
        call(subject, model, x, way=TRAIN) for x in (tokens, torch.cat((tokens[:, :-1], tokens[:, :1]), 1))
    )
    assert not torch.equal(first[:, :-1], second[:, :-1])  # or this tests nothing
    found = judge(CHECKS[f"{PAST}_in_training"], subject, {})
    assert found.outcome == "passed", found.says


# -- documents that an id parts


def parted_by(name: str, *, early: bool) -> Subject:
    """The reference with documents that id 0 parts: counted to the next (`early`) or its own, held in that setting."""

    def change(model):
        kept = model.eos_id
        if early:
            model.counted = lambda ends: ends.cumsum(dim=1)
        if name != "eos_id":
            del model.eos_id
            type(model).eos_id = kept  # which is no setting of the model's own
            if name:
                setattr(model, name, kept)

    parts = parted()
    build = parts.build_model

    def build_changed(**sizes):
        model = build(**sizes)
        model.__class__ = type("Parted", (PartedTransformer,), {})
        change(model)
        return model

    parts.build_model = build_changed
    return Subject("parted", parts, seed=3)


@pytest.mark.parametrize(
    ("name", "early", "says"),
    [
        ("eos_id", False, ""),
        ("eos_id", True, "the end token, id 0 (eos_id), is counted to the next document"),
        ("bos_token_id", True, ""),
        ("bos_token_id", False, "the begin token, id 0 (bos_token_id), is counted to the document before it"),
        ("", True, ""),
        ("", False, ""),
    ],
)
def test_an_id_that_parts_documents_is_judged_by_its_name(name, early, says):
    found = judge(CHECKS["check_past_reaches_every_later_position"], parted_by(name, early=early), {})
    assert found.outcome == ("failed" if says else "passed"), found.says
    assert says in found.says
    assert bool(found.remarks) == (not name)
    assert all("id 0 parts documents" in remark for remark in found.remarks)


def test_only_the_id_that_parts_documents_is_found():
    (parting,) = partings(Subject("parted", parted(), seed=3))
    assert (parting.id, parting.ends, parting.names) == (0, True, ("eos_id",))
    assert partings(reference(seed=3)) == ()
    assert partings(Subject("window", sliding_window(), seed=3)) == ()
    cut = undivided(Subject("parted", parted(), seed=3), torch.tensor([[0, 1, 16, 0]]))
    assert cut.tolist() == [[1, 1, 16, 1]]
