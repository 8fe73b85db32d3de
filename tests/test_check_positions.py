"""Findings of the position checks: the positions that look the same, and what should tell them apart."""

from __future__ import annotations

import pytest
import torch

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs.designs import NoPositions, changed
from transformer_checks.checks.check_positions import check_order_of_tokens_matters
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND: dict[str, Told] = {
    "position-constant": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 1 of 40", "all 109 pairs", "positions.table.weight"),
        "position-constant",
    ),
    "positions-start-again": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 8 of 40", "8 of 109 pairs"),
        "positions-start-again",
    ),
    "rotary-positions-start-again": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 32 of 40",),
        "positions-start-again",
    ),
    "positions-clamped": ("order_of_tokens_matters", None, ("of 131", "look the same"), "positions-start-again"),
    "rope-on-the-wrong-axis": (
        "order_of_tokens_matters",
        None,
        ("order has no effect", "RotaryAlongHeads"),
        "rope-on-the-wrong-axis",
    ),
    "rope-opposite-signs": (
        "rotary_angle_depends_on_distance",
        "blocks.0",
        ("query 4 and key 4", "query 3 and key 3"),
        "rope-opposite-signs",
    ),
    "rope-only-on-q": ("rotary_angle_depends_on_distance", "blocks.0", ("not relative",), "rope-only-on-q"),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("positions", bug, FOUND[bug])


def test_unused_position_ids_do_not_count_as_positions():
    """A model with rotary positions switched off may still hold position ids, which nothing turns into angles."""

    def change(model):
        model.positions = NoPositions()
        for name in ("position_ids", "token_positions"):
            setattr(model.blocks[0], name, torch.arange(13))

    found = judge(check_order_of_tokens_matters, Subject("ids", changed(change), seed=3), {})
    assert found.outcome == "passed" and "NoPE" in found.remarks[0]
