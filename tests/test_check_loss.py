"""What the loss checks say of each bug, and that they say nothing of right losses as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.controls_training import LOSSES, loss_subject, of_transformers
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.bugs.loss import losses
from transformer_checks.checks.bugs.losses_in_forward import ReturnsItsLoss
from transformer_checks.checks.check_loss import check_a_place_is_trained_on_its_own_target
from transformer_checks.checks.loss.met_loss import met_loss
from transformer_checks.checks.meet.roles import named_otherwise, targets_of
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

CHECKS = {check_id(check).partition(".")[2]: check for check in checks_in("loss")}
PLACE, DROPPED = "check_a_place_is_trained_on_its_own_target", "check_no_target_is_dropped"
MASK, VALUE = "check_mask_drops_its_targets_and_no_others", "check_value_is_the_closed_form"
IGNORED = "check_ignored_targets_are_not_trained"
SAME_LOGITS = "check_targets_leave_the_logits_as_they_are"

# bug, check, and facts that its message must hold: positions, numbers, names
SAID = [
    ("label-shift-missing", PLACE, ["shifts its targets by -1", "expected 0", "the token just read"]),
    ("label-shifted-twice", PLACE, ["shifts its targets by 1", "target t + 1", "twice"]),
    ("flatten-then-shift", PLACE, ["row 0, position 6", "row 1's target 0", "flattened before it is shifted"]),
    ("logits-labels-reshape-order", PLACE, ["rows are mixed", "reshaped in different orders"]),
    ("last-target-dropped", DROPPED, ["drops target 8", "of 0-8", "the last target is never trained"]),
    ("loss-mask-shifted-by-one", MASK, ["should drop targets 0-2", "1 position too late"]),
    ("loss-mask-ignored", MASK, ["drops no target", "should drop targets 0-2", "no effect"]),
    ("loss-mask-inverted", MASK, ["drops targets 3-8", "should drop targets 0-2", "inverted"]),
    ("masked-mean-over-all-positions", VALUE, ["divided by all positions"]),
    ("masked-numerator-unmasked", VALUE, ["the sum over all positions divided by the number of unmasked"]),
    ("loss-mean-of-sequence-means", VALUE, ["the mean over rows of each row's mean"]),
    ("loss-divided-by-one-less", VALUE, ["divided by their number minus 1"]),
    ("ignore-index-mismatch", VALUE, ["the last token id as target where masked"]),
    ("masked-logits-zeroed", VALUE, ["adds ln V"]),
    ("log-plus-eps", VALUE, ["-log(p + 1e-4)"]),
    ("loss-in-bf16", VALUE, ["%", "bfloat16"]),
    ("softmax-twice", VALUE, ["a second softmax"]),
    ("loss-softmax-over-positions", VALUE, ["a softmax over positions"]),
    ("loss-in-bits", VALUE, ["in bits"]),
    ("labels-smoothed", VALUE, ["0.0941", "declared 0"]),
    ("pad-id-collides-with-real-token", "check_every_symbol_counts_as_target", ["token id 0"]),
    ("naive-log-of-softmax", "check_extreme_logits_stay_finite", ["logits up to 1000", "inf"]),
    ("nan-times-zero-mask", "check_masked_logits_may_be_anything", ["NaN logits at masked positions"]),
    ("all-masked-batch-nan", "check_nothing_to_learn_is_no_loss", ["all targets masked", "nan"]),
    ("labels-alias-input-ids", "check_loss_leaves_its_inputs_alone", ["its targets", "-100"]),
    ("nll-of-raw-logits", "check_loss_takes_what_the_model_gives", ["returns logits", "expects log-probabilities"]),
    (
        "nll-of-raw-logits-in-forward",
        "check_loss_takes_what_the_model_gives",
        ["forward passes its loss logits", "expects log-probabilities", "never applied"],
    ),
    ("naive-log-of-softmax-in-forward", "check_extreme_logits_stay_finite", ["logits up to 1000", "inf"]),
    ("loss-without-targets-in-forward", PLACE, ["the same for any targets"]),
    ("labels-of-transformers-unshifted", PLACE, ["labels[:, t]", "PreTrainedModel"]),
    ("ignored-label-clamped", IGNORED, ["a target of -100 (no token id) is trained", "as if it were token id 0"]),
    ("smoothing-trains-ignored-labels", IGNORED, ["a target of -100", "times that of a real target, should be 0"]),
    ("ignore-index-unused", IGNORED, ["a target of 0 (ignore_index=0 by default)", "as if it were token id 0"]),
    ("loss-detached", PLACE, ["no gradient"]),
    ("loss-of-scaled-logits", VALUE, ["logits multiplied by 0.5"]),
    ("loss-of-other-ids", PLACE, ["a target of token id 1 trains token id 0", "16 of 17"]),
    ("loss-negated", PLACE, ["minus a cross entropy", "every target less probable"]),
    ("loss-without-targets", PLACE, ["the same for any targets"]),
    ("loss-returns-logits", PLACE, ["a tensor [14, 17]", "as many numbers as there are logits"]),
    ("loss-never-computed", "check_targets_give_a_loss", ["a tensor [21, 17] as output[1]", "instead of a loss"]),
    ("loss-is-a-function", "check_targets_give_a_loss", ["the function cross_entropy as output[1]"]),
    ("loss-of-hidden-states", SAME_LOGITS, ["[3, 7, 32]", "[3, 7, 17]", "32 numbers per position"]),
    ("loss-of-other-logits", SAME_LOGITS, ["row 0, position 0", "with targets", "than without"]),
    ("loss-beside-the-head", "check_the_loss_trains_what_makes_the_logits", ["depend on head.weight", "no gradient"]),
    ("loss-mask-of-row-0", MASK, ["row 1 the loss drops targets 0-2, should drop target 0", "row 0's mask"]),
]


@pytest.mark.parametrize(("bug", "check", "facts"), SAID, ids=[bug for bug, _, _ in SAID])
def test_a_finding_names_the_mistake(bug, check, facts):
    """Positions, numbers and the nature of the mistake are in the message, and the bug is the first suspect."""
    verdict = judge(CHECKS[check], all_bugs()[bug].subject(), {})
    assert verdict.outcome == "failed"
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says
    assert not verdict.likely or {bug, bug.removesuffix("-in-forward")} & {*verdict.likely}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_right_losses_are_not_accused(name, seed):
    """Sum, mean, -1, -100, a shift inside, a mask of any kind: recognised, and nothing fails."""
    subject = loss_subject(name, seed=seed)
    accused = [v.says for check in CHECKS.values() if (v := judge(check, subject, {})).outcome in ("failed", "error")]
    assert not accused


def test_the_loss_of_the_transformers_library_is_met():
    """It shifts inside, takes -100, a vocabulary size, and computes in float32."""
    subject = Subject("hf", vars_of(of_transformers()))
    accused = [v.says for check in CHECKS.values() if (v := judge(check, subject, {})).outcome in ("failed", "error")]
    met = met_loss(subject)
    assert not accused
    assert (met.shift, met.masks, met.reduction) == (1, "label -100", "mean")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("flattened by view", dict(shift=0, masks="label -100", reduction="mean")),
        ("CrossEntropyLoss(ignore_index=-1)", dict(masks="label -1")),
        ("CrossEntropyLoss(ignore_index=0)", dict(masks="label 0", left_out=(0,))),
        ("CrossEntropyLoss(sum)", dict(reduction="sum")),
        ("mean of each row", dict(reduction="the mean over rows of each row's mean", masks="argument")),
        ("shift and mask inside", dict(shift=1, masks="argument")),
        ("nll_loss of log-probabilities", dict(domain="log-probabilities")),
        ("prompt of targets 1-3 skipped", dict(dropped=(1, 2, 3))),
        ("first three targets skipped", dict(dropped=(0, 1, 2))),
    ],
)
def test_conventions_are_read_from_the_gradient(name, facts):
    """Shift, mask, reduction, domain and dropped targets are found, not assumed."""
    met = met_loss(loss_subject(name))
    assert {key: getattr(met, key) for key in facts} == facts


def losses_of(logits, targets):
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize(
    ("check", "loss", "facts"),
    [
        (VALUE, lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets) ** 2,
         ["the square of the mean"]),
        (VALUE, lambda logits, targets: losses_of(logits.view(len(logits), logits.shape[2], -1).mT, targets).mean(),
         ["[B, T, V] read as [B, V, T]"]),
        (VALUE, lambda logits, targets, mask: losses_of(logits * mask[..., None], targets).sum() / mask.sum(),
         ["divided by the number of unmasked", "adds ln V"]),
        (VALUE, lambda logits, targets, mask: (losses_of(logits, targets) / mask.sum(1, True))[mask].sum() / mask.sum(),
         ["× 0.1667 in row 0 (6 targets)", "× 0.125 in row 1 (8 targets)"]),
        (VALUE, lambda logits, targets: (losses_of(logits, targets) * torch.arange(targets.shape[1])).mean(),
         ["the targets of row 0 have", "times the right weight"]),
        (DROPPED, lambda logits, targets: losses_of(logits[:1], targets[:1]).mean(),
         ["nothing of this row is trained"]),
        ("check_known_logits_give_known_losses",
         lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets, label_smoothing=0.9),
         ["0.847 of the probability", "confidence"]),
    ],
)  # fmt: skip
def test_a_mistake_of_no_known_bug_is_named_too(check, loss, facts):
    """What the loss equals, how it weights its targets and which logits it pairs them with is measured."""
    verdict = judge(CHECKS[check], Subject("own", vars_of(loss)), {})
    assert verdict.outcome == "failed"
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: (lambda x: ((1 - (-x).exp()) * x).mean())(losses_of(logits, targets)),
        lambda logits, targets: (logits.softmax(-1) - nn.functional.one_hot(targets, 17)).square().sum(-1).mean(),
        lambda logits, targets: (losses_of(logits, targets) + (1 - (-losses_of(logits, targets)).exp())).mean(),
        lambda logits, targets: (
            losses_of(logits, targets) + 0.01 * (logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        ).mean(),
    ],
    ids=["focal", "Brier score", "poly", "with a bonus for entropy"],
)
def test_a_loss_that_is_no_cross_entropy_is_not_judged_as_one(loss):
    """The checks advise that it is not a cross entropy, since it may be intended."""
    subject = Subject("own", vars_of(loss))
    found = [judge(check, subject, {}) for check in CHECKS.values()]
    assert not [v.says for v in found if v.outcome in ("failed", "error")]
    assert any("not a cross entropy" in remark for v in found for remark in v.remarks)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_teachers_answer_beside_the_targets_is_not_taken_for_targets(share):
    answer = torch.randn(17, generator=torch.Generator().manual_seed(3)).mul(2).softmax(-1)

    def loss(logits, targets):
        soft = -(answer.to(logits) * logits.log_softmax(-1)).sum(-1)
        return ((1 - share) * losses_of(logits, targets) + share * soft).mean()

    found = [judge(check, Subject("own", vars_of(loss)), {}) for check in CHECKS.values()]
    assert not [v.says for v in found if v.outcome in ("failed", "error")]


def test_an_id_that_is_left_out_is_judged_by_the_tokenizer():
    """A failure only where the tokenizer uses the id in the sentence."""

    class Characters:
        def __init__(self, first: int) -> None:
            self.first = first

        def encode(self, text):
            return [self.first + sorted(set(text)).index(character) for character in text]

    for first, outcome in ((0, "failed"), (1, "passed")):
        parts = vars_of(nn.CrossEntropyLoss(ignore_index=0))
        parts.tokenizer = Characters(first)
        verdict = judge(CHECKS["check_every_symbol_counts_as_target"], Subject("own", parts), {})
        assert verdict.outcome == outcome, verdict.says


class TwoReturns(nn.Module):
    """A model in nanoGPT's manner: logits and, given targets, the loss."""

    def __init__(self, shift: int, divided: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)
        self.shift, self.divided = shift, divided

    def forward(self, idx, targets=None):
        logits = self.head(self.embedding(idx))
        if targets is None:
            return logits, None
        n = self.shift
        kept, labels = logits[:, : logits.shape[1] - n], targets[:, n:]
        losses = nn.functional.cross_entropy(kept.transpose(1, 2), labels, ignore_index=-1, reduction="none")
        return logits, losses.mean() if self.divided else losses.sum() / (labels != -1).sum()


def test_the_loss_that_a_model_returns_is_judged():
    """Its head outputs chosen logits; a loss that divides by masked targets too is found."""
    right = Subject("model", vars_of(None, lambda **sizes: TwoReturns(0, False)))
    assert met_loss(right).inside_model
    assert not [v.says for c in CHECKS.values() if (v := judge(c, right, {})).outcome in ("failed", "error")]
    twice = Subject("model", vars_of(None, lambda **sizes: TwoReturns(2, False)))
    assert "by 2" in judge(CHECKS[PLACE], twice, {}).says
    divided = Subject("model", vars_of(None, lambda **sizes: TwoReturns(0, True)))
    assert "divided by all positions" in judge(CHECKS[VALUE], divided, {}).says


@pytest.mark.parametrize(
    ("loss", "outcome"),
    [
        (lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets), "passed"),
        (lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets, label_smoothing=0.1), "passed"),
        (lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets, ignore_index=-1), "passed"),
        (lambda logits, targets, mask: (losses_of(logits, targets) * mask).sum() / mask.sum(), "passed"),
        (lambda logits, targets, mask: (losses_of(logits, targets) * (mask + 1e-7)).sum() / mask.sum(), "failed"),
        # counted from the end, -1 is the last token: nobody said that it is ignored
        (lambda logits, targets: -logits.log_softmax(-1)[torch.arange(len(targets))[:, None],
                                                         torch.arange(targets.shape[1]), targets].mean(),
         "not_applicable"),
        (lambda logits, targets: -(nn.functional.one_hot(targets, 17) * logits.log_softmax(-1)).sum(-1).mean(),
         "not_applicable"),
        # a z-loss that reaches padding is advice
        (lambda logits, targets: nn.functional.cross_entropy(logits.mT, targets)
         + 1e-3 * logits.logsumexp(-1).square().mean(), "passed"),
    ],
    ids=["cross_entropy", "smoothed", "-1", "mask", "mask of 1e-7", "indexed", "one-hot", "z-loss"],
)  # fmt: skip
def test_only_labels_that_a_loss_accepts_as_ignored_are_judged(loss, outcome):
    """A mask that is not quite 0 fails; an index from the end and a crash are no claim to ignore anything."""
    verdict = judge(CHECKS[IGNORED], Subject("own", vars_of(loss)), {})
    assert verdict.outcome == outcome, verdict.says


class TakesLabels(nn.Module):
    """Its arguments are those of the models of transformers; `n` is its own shift."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.embedding, self.head, self.n = nn.Embedding(17, 8), nn.Linear(8, 17), n

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids))
        if labels is None:
            return logits, None
        kept = logits[:, : logits.shape[1] - self.n]
        return logits, nn.functional.cross_entropy(kept.transpose(1, 2), labels[:, self.n :])


def test_labels_that_forward_does_not_shift_are_remarked_on_where_nothing_shows_what_is_passed():
    remarks = {}
    for n in (0, 1):
        verdict = judge(CHECKS[PLACE], Subject("model", vars_of(None, lambda n=n, **sizes: TakesLabels(n))), {})
        assert verdict.outcome == "passed"
        remarks[n] = " ".join(verdict.remarks)
    assert "does not shift its labels" in remarks[0] and not remarks[1]


def test_a_mean_of_the_means_of_rows_is_remarked_on():
    """It is a usual choice, so it fails only where another mean is declared."""
    verdict = judge(CHECKS[VALUE], loss_subject("mean of each row"), {})
    assert verdict.outcome == "passed" and any("counts 4 times as much" in remark for remark in verdict.remarks)


def test_a_loss_that_cannot_be_called_is_not_accused():
    """The reason is given: a parameter of unknown role, or the errors of every form tried."""
    verdict = judge(CHECKS[PLACE], Subject("other", vars_of(lambda anchor, positive, negative, margin: anchor)), {})
    assert (verdict.outcome, "'margin'" in verdict.says) == ("not_applicable", True)
    verdict = judge(CHECKS[PLACE], Subject("other", vars_of(lambda logits, targets: logits.no_such_method())), {})
    assert verdict.outcome == "not_applicable"
    assert "no_such_method" in verdict.evidence["tried"][0]


def test_reading_survives_a_vocabulary_smaller_than_the_batch():
    """With fewer token ids than positions, labels spell out their position in several digits."""
    from transformer_checks.checks.loss.reading import read
    from transformer_checks.transformer.loss import next_token_loss

    reading = read(next_token_loss, torch.arange(3), 3)
    assert torch.equal(reading.source, torch.arange(14).view(2, 7))
    assert torch.allclose(reading.weight, torch.full((2, 7), 1 / 14, dtype=torch.float64))


def vars_of(loss, build=None):
    from types import SimpleNamespace

    return SimpleNamespace(build_model=build or reference_parts().build_model, loss=loss)


# -- what a model returns when it is handed targets

RETURNED = [CHECKS[f"check_{name}"] for name in (
    "targets_give_a_loss", "targets_leave_the_logits_as_they_are", "the_loss_trains_what_makes_the_logits"
)]  # fmt: skip


class Answering(ReturnsItsLoss):
    """Without targets `plain(logits)`, with them `full(logits, loss)`."""

    plain = staticmethod(lambda logits: logits)
    full = staticmethod(lambda logits, loss: (logits, loss))

    def forward(self, tokens, mask=None, cache=None, targets=None):
        if targets is None:
            return self.plain(super().forward(tokens))
        return self.full(super().forward(tokens), losses(super().forward(tokens), targets))


def answering(plain, full):
    def change(model):
        model.__class__ = type("Answering", (Answering,), dict(plain=staticmethod(plain), full=staticmethod(full)))

    return Subject("answering", changed(change))


def same(logits):
    return logits


RIGHT = {
    "logits, then logits and loss": answering(same, lambda logits, loss: (logits, loss.mean())),
    "a loss first": answering(same, lambda logits, loss: (loss.mean(), logits)),
    "a loss alone": answering(same, lambda logits, loss: loss.mean()),
    "losses of all targets": answering(same, lambda logits, loss: (logits, loss)),
    "losses in one list": answering(same, lambda logits, loss: (logits, loss.flatten())),
    "flattened logits": answering(lambda x: (x, None), lambda logits, loss: (logits.flatten(0, 1), loss.mean())),
    "the last position": answering(lambda x: (x[:, -1:], None), lambda logits, loss: (logits, loss.mean())),
    "the last position, squeezed": answering(lambda x: x[:, -1], lambda logits, loss: (logits, loss.mean())),
    "None": answering(lambda x: (x, None), lambda logits, loss: (logits, None)),
    "the targets given back": answering(lambda x: (x, None), lambda logits, loss: (logits, logits.argmax(-1))),
    "a dict": answering(lambda x: dict(logits=x), lambda logits, loss: dict(logits=logits, loss=loss.mean())),
    "parts of a loss": answering(lambda x: (x, {}), lambda logits, loss: (logits, dict(ce=loss.mean(), z=loss.var()))),
    "probabilities for use": answering(lambda x: x.softmax(-1), lambda logits, loss: (logits, loss.mean())),
    "targets that are not used": answering(same, lambda logits, loss: logits),
    "more logits with targets": answering(lambda x: x[:, -1:], lambda logits, loss: logits),
    "a noisy router": answering(
        lambda x: x + torch.randn_like(x), lambda logits, loss: (logits + torch.randn_like(logits), loss.mean())
    ),
    "a condition that is no target": answering(same, lambda logits, loss: logits + 1 + logits.square()),
    "a shift inside": answering(same, lambda logits, loss: (logits[:, :-1], loss[:, 1:].mean())),
}


@pytest.mark.parametrize("name", RIGHT)
def test_ways_to_return_a_loss_are_not_accused(name):
    accused = [v.says for check in RETURNED if (v := judge(check, RIGHT[name], {})).outcome in ("failed", "error")]
    assert not accused


@pytest.mark.parametrize(
    ("plain", "full", "fact"),
    [
        (lambda x: x, lambda logits, loss: nn.functional, "the module torch.nn.functional"),
        (lambda x: (x, None), lambda logits, loss: (logits, logits.flatten(0, 1)), "[21, 17] as output[1]"),
        (lambda x: dict(logits=x), lambda logits, loss: dict(logits=logits, loss=loss.mean), "builtin_function"),
    ],
)
def test_what_is_no_loss_is_described(plain, full, fact):
    found = judge(RETURNED[0], answering(plain, full), {})
    assert found.outcome == "failed" and fact in found.says, found.says


class Demanding(nn.Module):
    """A model that must be handed targets, and gives a function for their loss."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

    def forward(self, idx, targets):
        return self.head(self.embedding(idx)), nn.functional.cross_entropy


def test_of_a_model_that_must_be_handed_targets_only_what_is_surely_no_loss_is_told():
    found = judge(RETURNED[0], Subject("demanding", vars_of(None, lambda **sizes: Demanding())), {})
    assert found.outcome == "failed" and "the function cross_entropy as output[1]" in found.says
    assert "without" not in found.says


@pytest.mark.parametrize("given", [None, nn.functional])
def test_a_loss_that_gives_no_number_is_told_what_it_gives(given):
    found = judge(CHECKS[PLACE], Subject("own", vars_of(lambda logits, targets: given)), {})
    assert found.outcome == "failed" and f"returns {'None' if given is None else 'a module'}" in found.says


@pytest.mark.parametrize("place", [-2, 0])
def test_another_position_than_the_last_is_told(place):
    """Without targets, the logits of another position come back than users expect."""
    found = judge(
        RETURNED[1], answering(lambda x: (x[:, [place]], None), lambda logits, loss: (logits, loss.mean())), {}
    )
    assert found.outcome == "failed" and "for the last position" in found.says


CONVENTIONS = Path(__file__).parent / "conventions"


@pytest.mark.parametrize("name", ["truth", "gold", "ys", "target_ids", "y_true", "next_tokens"])
@pytest.mark.parametrize("shown", ["truth.flatten()", "truth.roll(1, 0).flatten()"])
def test_the_loss_of_a_model_is_judged_whatever_its_targets_are_called(name, shown, tmp_path):
    source = (CONVENTIONS / "targets_of_another_name.py").read_text().replace("truth.flatten()", shown)
    (tmp_path / "model.py").write_text(source.replace("truth", name))
    subject = subject_of(str(tmp_path / "model.py"))
    verdict = judge(check_a_place_is_trained_on_its_own_target, subject, {})
    assert verdict.outcome == ("failed" if "roll" in shown else "passed")
    if "roll" in shown:
        assert "row 1's target 0" in verdict.says
    assert (f"{name} takes the targets" in subject.header) == (name == "truth")


@pytest.mark.parametrize("shown", ["labels[:, 1:].flatten()", "labels[:, 1:].roll(1, 0).flatten()"])
def test_a_model_is_given_with_targets_what_it_is_given_without(shown, tmp_path):
    """It reads two layers only with its cache switched off; a mistake in its loss is still found."""
    source = (CONVENTIONS / "cache_of_some_layers.py").read_text()
    (tmp_path / "model.py").write_text(source.replace("labels[:, 1:].flatten()", shown))
    verdict = judge(check_a_place_is_trained_on_its_own_target, subject_of(str(tmp_path / "model.py")), {})
    assert verdict.outcome == ("failed" if "roll" in shown else "passed"), verdict.says


def test_targets_are_recognised_by_what_they_do_and_other_ids_are_not():
    class Ids(nn.Module):
        """Other ids there move the logits."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, idx, kinds=None, aux=None, truth=None):
            logits = self.table(idx) + (0 if kinds is None else self.table(kinds))
            size = logits.square().mean()  # a number that comes whatever aux is
            return logits, size if truth is None else size + nn.functional.cross_entropy(logits.mT, truth), size

    tokens = torch.arange(6).view(2, 3) % 5
    assert targets_of(Ids(), tokens, 5) is None  # a number comes without them as well: it need be no loss
    assert not named_otherwise(None)
