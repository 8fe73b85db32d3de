"""What the checks of gradients say: which parameter, how far from the slope, and the module that is wrong."""

from __future__ import annotations

import pytest

from checks import checks_in
from checks.bugs import all_bugs
from checks.subject import reference
from checks.verdict import Verdict, judge

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks_in("gradients")}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
    "no-output-projection": (
        "every_parameter_gets_a_gradient",
        "blocks.0.attention.output",
        ("blocks.0.attention.output.weight, and 3 more",),
        "no-output-projection",
    ),
    "norm-reused": (
        "every_parameter_gets_a_gradient",
        "blocks.1.feed_forward_norm",
        ("blocks.1.feed_forward_norm.weight",),
        "norm-reused",
    ),
    "last-block-skipped": (
        "every_parameter_gets_a_gradient",
        "blocks.1.attention_norm",
        ("and 11 more",),
        "last-block-skipped",
    ),
    "residual-doubled": (
        "every_parameter_gets_a_gradient",
        "blocks.0.attention_norm",
        ("and 23 more",),
        "residual-doubled",
    ),
    "untied-embedding-no-grad": (
        "every_parameter_gets_a_gradient",
        "embedding",
        ("embedding.weight gets no gradient",),
        "untied-embedding-no-grad",
    ),
    "position-table-detached": (
        "every_parameter_gets_a_gradient",
        "positions.table",
        ("positions.table.weight gets no gradient",),
        "position-table-detached",
    ),
    "inplace-op-breaks-autograd": (
        "every_parameter_gets_a_gradient",
        None,
        ("modified by an inplace operation",),
        "inplace-op-breaks-autograd",
    ),
    "residual-detached": (
        "gradients_equal_finite_differences",
        "blocks.1",
        ("embedding.weight", "finite differences"),
        "residual-detached",
    ),
    "head-detached": ("gradients_equal_finite_differences", "head", ("embedding.weight",), "residual-detached"),
    "feed-forward-detached": (
        "gradients_equal_finite_differences",
        "blocks.0.feed_forward",
        ("a ratio of",),
        "residual-detached",
    ),
    "gradient-wrong-in-training": (
        "training_gradients_equal_finite_differences",
        "blocks.1",
        ("in training mode",),
        "gradient-wrong-in-training",
    ),
    "checkpoint-recompute-rng": (
        "training_gradients_equal_finite_differences",
        "Transformer",
        ("in training mode",),
        "checkpoint-recompute-rng",
    ),
    "norm-over-batch": ("rows_get_their_own_gradient", None, ("row 0", "row 1"), "norm-over-batch"),
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
