"""What the laws of the cache say about each way to get it wrong, and whom they leave alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.check_cache import check_cached_decoding_equals_full, without_lone_padding
from transformer_checks.checks.probes.cached import distances, first_wrong
from transformer_checks.checks.probes.precision import Coarsest
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import Transformer

CHECKS = {check.__name__: check for check in checks_in("cache")}
SEED = 3


def verdict(bug: str, check: str) -> Verdict:
    found = judge(CHECKS[check], all_bugs()[bug].subject(seed=SEED), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    return found


def findings(subject: Subject) -> list[str]:
    earlier: dict[str, Verdict] = {}
    for check in CHECKS.values():
        earlier[check_id(check)] = judge(check, subject, earlier)
    return [name for name, found in earlier.items() if found.outcome not in ("passed", "not_applicable", "blocked")]


DECODING = "check_cached_decoding_equals_full"
PIECES = "check_cached_pieces_equal_full"


def test_a_cache_that_is_not_read_is_named_by_the_tokens_that_do_not_count():
    found = verdict("cache-not-appended", DECODING)
    assert "token 4 and a cache of 4 tokens" in found.says and "tokens 0 to 11" in found.says
    assert found.evidence["position"] == 4 and found.likely[0] == "cache-not-appended"


def test_a_mask_at_the_top_left_is_named_by_what_it_shows():
    found = verdict("sdpa-topleft-alignment", DECODING)
    assert "depend on tokens 0 and 12, but not on tokens 1 to 11" in found.says
    assert found.likely[0] == "sdpa-topleft-alignment"


def test_a_mask_at_the_top_left_of_pieces_only_is_named_by_what_it_hides():
    found = verdict("sdpa-topleft-chunk-only", PIECES)
    assert "not on tokens 7 to 11" in found.says and "sdpa-topleft-chunk-only" in found.likely
    assert sum(found.example["pieces"]) == 13 and len(found.example["pieces"]) == 2


def test_a_prefill_without_a_mask_is_named_by_the_future_it_sees():
    found = verdict("prefill-unmasked-when-cache-given", DECODING)
    assert "an empty cache" in found.says and "position 0" in found.says and "later tokens 1 to 3" in found.says
    assert found.likely[0] == "prefill-unmasked-when-cache-given"


@pytest.mark.parametrize(
    ("bug", "check", "place"),
    [
        ("decode-position-always-zero", DECODING, "token 4 and a cache of 4"),
        ("rope-single-position-kernel", DECODING, "token 4 and a cache of 4"),
        ("prefill-all-same-position", DECODING, "tokens 0 to 3 and an empty cache"),
        ("chunked-prefill-positions", PIECES, "tokens 1 to 12 and a cache of 1"),
    ],
)
def test_wrong_positions_are_told_from_wrong_masks(bug, check, place):
    found = verdict(bug, check)
    assert place in found.says and "wrong positions" in found.says
    assert bug in found.likely


def test_rows_and_layers_that_meet_are_named():
    assert "each row alone is right" in verdict("cache-rows-mixed", DECODING).says
    assert "with one block they are right" in verdict("cache-swaps-layers", DECODING).says


def test_a_declared_window_that_cached_keys_do_not_leave_is_named():
    found = verdict("window-lost-in-decoding", DECODING)
    assert "right up to position 3: the declared window of 4 tokens is not applied" in found.says
    assert found.likely == ("window-lost-in-decoding",)


def test_padding_forgotten_by_the_cache_is_shown_with_its_mask():
    found = verdict("cache-forgets-padding", "check_cached_padding_equals_full")
    assert 0 in found.evidence["mask"] and found.evidence["mask"][found.evidence["position"]] == 1
    assert {"pieces", "side", "seed"} <= found.example.keys()


def takes_short_pieces_for_real(most: int):
    """With a cache, short pieces are taken for generated tokens, which are never padding."""

    def change(model: Transformer) -> None:
        forward = model.forward

        def read(tokens, mask=None, cache=None):
            if cache is not None and mask is not None and tokens.shape[1] <= most:
                mask = torch.ones_like(mask)
            return forward(tokens, mask, cache)

        model.forward = read

    return Subject("short pieces", changed(change), seed=SEED)


def test_a_single_padding_token_taken_for_a_generated_one_is_advice_and_padding_in_pieces_a_fault():
    alone = judge(CHECKS["check_cached_padding_equals_full"], takes_short_pieces_for_real(1), {})
    assert alone.outcome == "passed" and "in pieces of two tokens or more" in alone.remarks[0]
    found = judge(CHECKS["check_cached_padding_equals_full"], takes_short_pieces_for_real(3), {})
    assert found.outcome == "failed" and found.evidence["mask"][found.evidence["position"]] == 1


def test_a_lone_padding_token_is_read_with_what_follows():
    left = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert without_lone_padding([1, 1, 1, 1, 1], left) == [2, 1, 1, 1]
    assert without_lone_padding([1, 4], left) == [5] and without_lone_padding([2, 3], left) == [2, 3]
    assert without_lone_padding([3, 1, 1], left.flip(1)) == [3, 2]


def test_a_cache_that_stays_on_the_model_is_found_by_the_second_text():
    found = verdict("cache-leaks-between-calls", "check_caches_are_isolated")
    assert "a second text" in found.says and found.evidence["position"] == 0


def test_an_overflow_is_named_with_both_lengths():
    found = verdict("cache-overflow", "check_cache_overflow_is_refused_or_slides")
    assert "15 tokens" in found.says and "block size is 13" in found.says and found.evidence["position"] == 13


@pytest.mark.parametrize("lost", [0, 1])
def test_rotary_positions_may_go_on_behind_the_block_and_a_token_lost_there_is_found(lost):
    """Read whole, more tokens than the block holds are refused: a model of the same weights and a longer block says."""

    def change(model):
        class GoesOn(Transformer):
            def new_cache(self, batch_size, capacity):
                return super().new_cache(batch_size, 2 * capacity)

            def refuse_bad_input(self, tokens, mask, cache):
                if cache is None:
                    super().refuse_bad_input(tokens, mask, cache)
                elif cache.length == self.config.block_size:
                    cache.length -= lost

        model.__class__ = GoesOn

    subject = Subject("goes on", changed(change, positions="rotary"), seed=SEED)
    found = judge(CHECKS["check_cache_overflow_is_refused_or_slides"], subject, {})
    assert found.outcome == ("failed" if lost else "passed"), found.says


@pytest.mark.parametrize(
    "bug", [bug for bug in all_bugs().values() if bug.component == "key_value_cache"], ids=lambda bug: bug.id
)
def test_one_mistake_gives_one_finding(bug):
    assert len(findings(bug.subject(seed=SEED))) == 1


@pytest.mark.parametrize("config", [{}, dict(positions="rotary", n_kv_head=2), dict(attention="explicit")], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reference_is_left_alone(config, seed):
    assert findings(Subject("transformer", reference_parts(**config), seed=seed)) == []


def test_a_model_without_a_cache_is_not_judged():
    class Plain(torch.nn.Embedding):
        def forward(self, tokens, mask=None):
            return super().forward(tokens)

    parts = reference_parts()
    parts.build_model = lambda vocab_size, **sizes: Plain(vocab_size, vocab_size)
    found = judge(CHECKS[DECODING], Subject("plain", parts), {})
    assert found.outcome == "not_applicable" and "no key-value cache" in found.says


def test_nan_on_one_side_is_a_difference_and_a_missing_answer_is_none():
    want = torch.zeros(1, 3, 2)
    got = torch.zeros(1, 3, 2)
    got[0, 1], got[0, 2] = torch.inf, torch.nan
    assert distances(got, want).tolist() == [[0.0, 0.0, torch.inf]]
    assert first_wrong(got, want, 1e-9) == (0, 2)
    assert first_wrong(got, want, 1e-9, real=torch.tensor([[True, True, False]])) is None


def test_the_coarsest_type_on_the_way_is_seen_even_when_written_into_a_buffer():
    with Coarsest() as seen:
        buffer = torch.zeros(2, dtype=torch.float64)
        assert seen.dtype == torch.float64
        torch.zeros(2, dtype=torch.bfloat16).copy_(buffer)
    assert seen.dtype == torch.bfloat16


UNREADABLE = """
import torch
from torch import nn
from torch.nn import functional as F


class GPT(nn.Module):
    def __init__(self, vocab_size=40, block_size=16, n_embd=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.qkv, self.head = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx, {name}=None):
        S = 0 if {name} is None else {name}[0].shape[1]
        x = self.tokens(idx) + self.places(torch.arange(S, S + idx.shape[1]))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if {name} is not None:
            k, v = torch.cat(({name}[0], k), 2), torch.cat(({name}[1], v), {axis})
        mask = torch.ones(idx.shape[1], k.shape[1], dtype=torch.bool).tril(S)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + y), {kept}
"""


@pytest.mark.parametrize(
    ("name", "axis", "kept", "outcome"),
    [("past", 2, "(k, v)", "failed"), ("past", 2, "None", "not_applicable"), ("state", 2, "(k, v)", "not_applicable")],
)
def test_a_cache_that_cannot_be_read_again_is_a_fault_if_it_surely_is_one(tmp_path, name, axis, kept, outcome):
    file = tmp_path / "model.py"
    file.write_text(UNREADABLE.format(name=name, axis=axis, kept=kept))
    verdict = judge(check_cached_decoding_equals_full, subject_of(str(file), seed=0), {})
    assert verdict.outcome == outcome, verdict.says
    if outcome == "failed":
        assert "cannot read a text with its cache" in verdict.says and "RuntimeError" in verdict.says
        assert verdict.where is not None and verdict.where.line == 18


CONVENTIONS = Path(__file__).parent / "conventions"


def test_a_cache_that_the_caller_appends_to_is_read_so():
    assert findings(subject_of(str(CONVENTIONS / "past_appended_by_the_caller.py"), seed=SEED)) == []


def test_a_cache_returned_under_the_name_of_its_argument_is_all_that_the_model_gets(tmp_path):
    """The same code, but forward returns {"past": …}: handed back as it is, it has forgotten the prompt."""
    text = (CONVENTIONS / "past_appended_by_the_caller.py").read_text()
    returned = "return self.head(x + weights @ every), x"
    assert returned in text
    (tmp_path / "model.py").write_text(
        text.replace(returned, 'return {"logits": self.head(x + weights @ every), "past": x}')
    )
    found = judge(check_cached_decoding_equals_full, subject_of(str(tmp_path / "model.py"), seed=SEED), {})
    assert found.outcome == "failed" and "written but not read" in found.says


CONVENTIONS = Path(__file__).parent / "conventions"
INTO = "check_causality.check_future_cannot_change_past_into_a_cache"
TYPES = {
    "by an argument": ("", ""),
    "as is usual": (", device=device, dtype=dtype)", ")"),
    "float32 alone": (", dtype=dtype)", ", dtype=torch.float32)"),
}
LATER = "triu(S - T + 1 + (cache is not None and T > 9))"  # in texts longer than the one on which a cache is found


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("way", TYPES)
def test_a_cache_is_made_in_the_type_of_the_model(way, leaks, tmp_path):
    """One that holds float32 whatever the model has is read in float32. What leaks into it is found in any of them."""
    source = (CONVENTIONS / "cache_of_a_type.py").read_text().replace(*TYPES[way])
    (tmp_path / "model.py").write_text(source.replace("triu(S - T + 1)", LATER if leaks else "triu(S - T + 1)"))
    subject = subject_of(str(tmp_path / "model.py"), seed=SEED)
    check = next(check for check in checks_in("causality") if check_id(check) == INTO)
    assert judge(check, subject, {}).outcome == ("failed" if leaks else "passed")
    if not leaks:
        assert judge(CHECKS[DECODING], subject, {}).outcome == "passed"
