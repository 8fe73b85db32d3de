"""Findings of the gradient checks: the parameter, the distance from the slope, and the wrong module."""

from __future__ import annotations

import pytest

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import BACKWARD, Verdict, judge

FOUND: dict[str, Told] = {
    "no-output-projection": (
        "every_parameter_gets_a_gradient",
        "blocks.0.attention.output",
        ("blocks.0.attention.output.weight, and 3 more",),
        "no-output-projection",
    ),
    "norm-reused": (
        "every_parameter_gets_a_gradient",
        "blocks.1.feed_forward_norm",
        ("blocks.1.feed_forward_norm.weight, and 1 more, get no gradient",),
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
    "low-rank-factors-both-zero": (
        "no_two_zero_factors_wait_for_each_other",
        "blocks.0.feed_forward.output.down",
        ("output.down.weight and blocks.0.feed_forward.output.up.weight both start at zero", "neither ever learns"),
        "low-rank-factors-both-zero",
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


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("gradients", bug, FOUND[bug])


def test_a_value_changed_in_place_is_one_finding_and_blocks_what_needs_backward():
    subject = all_bugs()["inplace-op-breaks-autograd"].subject(seed=3)
    checks = [check for theme in ("contract", "initialization", "gradients") for check in checks_in(theme)]
    earlier: dict[str, Verdict] = {}
    for check in checks:
        earlier[check_id(check)] = judge(check, subject, earlier)
    found = {name: verdict.outcome for name, verdict in earlier.items()}
    assert [name for name, outcome in found.items() if outcome in ("failed", "error")] == [BACKWARD]
    told = earlier["check_contract.check_inputs_are_left_alone"]
    assert told.outcome == "blocked" and BACKWARD in told.says and "inplace" in told.says
