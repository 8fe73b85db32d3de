"""What the checks of evaluation and training mode say: which dropout, in which module, in which mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checks import checks_in
from checks.bugs import all_bugs
from checks.bugs.variants import changed
from checks.subject import Subject, reference
from checks.verdict import Verdict, judge

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks_in("modes")}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
    "attn-dropout-in-eval": ("eval_repeats_itself", "blocks.0.attention", ("without a mask",), "attn-dropout-in-eval"),
    "resid-dropout-in-eval": (
        "eval_repeats_itself",
        "blocks.1",
        ("two calls with the same tokens",),
        "resid-dropout-in-eval",
    ),
    "forward-reseeds": (
        "eval_leaves_random_state_alone",
        "Reseeding",
        ("global random state of PyTorch",),
        "forward-reseeds",
    ),
    "forward-changes-weights": (
        "forward_leaves_weights_alone",
        "Normalizing",
        ("embedding.weight",),
        "forward-changes-weights",
    ),
    "train-method-forgets-a-part": (
        "modes_reach_every_part",
        "blocks.1.attention",
        ("model.eval()", "still in training mode"),
        "train-method-forgets-a-part",
    ),
    "dropout-in-a-plain-list": (
        "modes_reach_every_part",
        None,
        ("blocks.0.drops[0]", "and 1 more"),
        "dropout-in-a-plain-list",
    ),
    "other-scale-without-gradients": (
        "gradient_mode_changes_nothing",
        "blocks.0.attention",
        ("torch.no_grad()",),
        "other-scale-without-gradients",
    ),
    "training-scales-embeddings": (
        "training_computes_what_evaluation_does",
        "Scaled",
        ("without dropout",),
        "training-scales-embeddings",
    ),
    "training-forward-reseeds": (
        "dropout_draws_anew",
        None,
        ("seeds the global generator of PyTorch",),
        "training-forward-reseeds",
    ),
    "dropout-from-its-own-generator": (
        "dropout_draws_anew",
        "blocks.0",
        ("with the same global seed",),
        "dropout-from-its-own-generator",
    ),
    "dropout-rate-ignored": (
        "dropout_obeys_its_rate",
        "residual",
        ("with dropout 0", "a rate of 0.5"),
        "dropout-rate-ignored",
    ),
    "dropout-without-rescaling": (
        "dropout_obeys_its_rate",
        "blocks.0.dropout",
        ("ones come out as 0.6", "as 1 in evaluation"),
        "dropout-without-rescaling",
    ),
    "dropout-scaled-in-evaluation-too": (
        "dropout_obeys_its_rate",
        "blocks.1",
        ("a dropout of 0.3", "one of 0"),
        "dropout-scaled-in-evaluation-too",
    ),
    "attention-dropout-not-applied": (
        "every_dropout_site_drops",
        "blocks.1.attention",
        ("a dropout of 0.3", "drops nothing"),
        "attention-dropout-not-applied",
    ),
    "dropout-mask-drawn-once": (
        "every_dropout_site_drops",
        "dropout",
        ("the same units on every call",),
        "dropout-mask-drawn-once",
    ),
    "dropout-off-forever-after-eval": (
        "dropout_survives_evaluation",
        "dropout",
        ("is 0, and was 0.3",),
        "dropout-off-forever-after-eval",
    ),
    "dropout-mask-shared-by-rows": (
        "dropout_differs_between_rows",
        "blocks.1",
        ("[1, 13, 32]", "no axis for rows"),
        "dropout-mask-shared-by-rows",
    ),
}


def verdict(check: str, bug: str) -> Verdict:
    return judge(CHECKS[check], BUGS[bug].subject(seed=3), {})


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    check, module, facts, likely = FOUND[bug]
    found = verdict(check, bug)
    assert found.outcome == "failed", found.says
    assert (found.where.module if found.where else None) == module
    for fact in facts:
        assert fact in found.says
    assert likely in found.likely[:2]
    assert found.advice


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_is_not_accused(check):
    found = judge(CHECKS[check], reference(seed=5), {})
    assert found.outcome in ("passed", "not_applicable"), found.says


def test_dropout_that_is_not_rescaled_is_legitimate_where_evaluation_scales():
    """Srivastava et al. 2014: units are dropped in training as they are, and all are scaled by 1 - p afterwards."""

    class Original(nn.Dropout):
        def forward(self, x):
            return x * (torch.rand_like(x) >= self.p) if self.training else x * (1 - self.p)

    def change(model):
        model.dropout.__class__ = Original

    found = judge(CHECKS["dropout_obeys_its_rate"], Subject("original", changed(change), seed=1), {})
    assert found.outcome == "passed", found.says
