"""What the checks of positions say: which places look the same, and which mechanism should tell them apart."""

from __future__ import annotations

import pytest

from checks import checks_in
from checks.bugs import all_bugs
from checks.subject import reference
from checks.verdict import Verdict, judge

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks_in("positions")}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
    "position-constant": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 1 of 40", "all of 109 pairs", "positions.table.weight"),
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
        ("order is not seen at all", "RotaryAlongHeads"),
        "rope-on-the-wrong-axis",
    ),
    "rope-opposite-signs": (
        "rotary_angle_depends_on_distance",
        None,
        ("query 4 and key 4", "query 3 and key 3"),
        "rope-opposite-signs",
    ),
    "rope-only-on-q": ("rotary_angle_depends_on_distance", None, ("not relative",), "rope-only-on-q"),
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
