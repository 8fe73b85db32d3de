"""What the checks of other paths say: which path, which position, which module."""

from __future__ import annotations

import pytest

from checks import checks_in
from checks.bugs import all_bugs
from checks.subject import reference
from checks.verdict import Verdict, judge

CHECKS = {
    check.__name__.removeprefix("check_"): check for check in checks_in("portability") if not hasattr(check, "slow")
}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
    "device-hardcoded": ("forward_stays_on_its_device", "add", ("torch.arange", "embedding"), "device-hardcoded"),
    "backends-disagree": (
        "attention_backends_agree",
        "blocks.0.attention",
        ("flash switched (without a mask)",),
        "backends-disagree",
    ),
    "other-path-when-compiled": (
        "compiled_model_agrees",
        None,
        ("aot_eager", "position 1"),
        "other-path-when-compiled",
    ),
    "constant-baked-in": ("exported_model_agrees", None, ("torch.export", "position 0"), "constant-baked-in"),
    "recomputation-under-no-grad": (
        "recomputation_changes_nothing",
        None,
        ("embedding.weight gets another gradient",),
        "recomputation-under-no-grad",
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
