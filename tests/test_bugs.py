"""Every bug is caught by the checks it names, every check catches one, and what catches it passes the undamaged model.

The last of these proves a bug live: the same check, seed and sizes, without the damage.
"""

from __future__ import annotations

import pytest
import torch

from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import Bug, all_bugs
from transformer_checks.checks.run.order import check_id
from transformer_checks.checks.run.verdict import Verdict, judge

CHECKS = {check_id(check): check for check in all_checks()}
BUGS = all_bugs()
SEED = 20


UNDAMAGED: dict[tuple, Verdict] = {}


def there(device: str) -> bool:
    """Whether this machine has such a device."""
    return device == "cpu" or device == getattr(torch.accelerator.current_accelerator(), "type", None)


def verdict_without_damage(check: str, bug: Bug) -> Verdict:
    key = (check, bug.of, *bug.sizes.items())
    if key not in UNDAMAGED:
        UNDAMAGED[key] = judge(CHECKS[check], bug.undamaged(seed=SEED, device=bug.device), {})
    return UNDAMAGED[key]


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_is_caught_and_live(bug: Bug):
    assert bug.caught_by, f"{bug.id} names no check"
    subject = bug.subject(seed=SEED, device=bug.device if there(bug.device) else "cpu")
    if not there(bug.device):
        for name in bug.caught_by:
            assert judge(CHECKS[name], subject, {}).outcome == "not_applicable", f"{name} passes what it cannot see"
        pytest.skip(f"only {bug.device} shows this bug, and there is none here: not run")
    for name in bug.caught_by:
        clean = verdict_without_damage(name, bug)
        assert clean.outcome == "passed", f"{name} on the undamaged reference: {clean.outcome}: {clean.says}"
        damaged = judge(CHECKS[name], subject, {})
        assert damaged.outcome == "failed", f"{name} on {bug.id}: {damaged.outcome}: {damaged.says}"


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_catches_a_bug(check):
    assert any(check in bug.caught_by for bug in BUGS.values()), f"{check} catches no known bug: can it fail?"


def test_likely_causes_are_known_bugs():
    """What a finding suggests can be looked up: `pytest --model bug:ID` shows it."""
    import re
    from pathlib import Path

    unknown = {}
    for path in sorted((Path(__file__).parent.parent / "checks").rglob("*.py")):
        for tuple_text in re.findall(r"likely=\(([^)]*)\)", path.read_text(encoding="utf-8")):
            for bug in re.findall(r'"([a-z0-9-]+)"', tuple_text):
                if bug not in BUGS:
                    unknown.setdefault(path.name, set()).add(bug)
    assert not unknown


def test_a_bug_says_what_it_is_in_one_line():
    for bug in BUGS.values():
        assert 10 < len(bug.says) < 140, bug.id
        assert "\n" not in bug.says
