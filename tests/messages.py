"""What the finding about a known bug must contain: the module, the facts, the likely cause, advice."""

from __future__ import annotations

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import Verdict, judge

BUGS = all_bugs()

# The check that finds a bug, the module it must name, facts in its message, and one of the first two likely causes.
Told = tuple[str, str | None, tuple[str, ...], str]


def verdict(theme: str, check: str, bug: str) -> Verdict:
    """The verdict of a check, named without `check_`, on a known bug."""
    checks = {each.__name__.removeprefix("check_"): each for each in checks_in(theme)}
    return judge(checks[check], BUGS[bug].subject(seed=3), {})


def expect_told(theme: str, bug: str, told: Told) -> None:
    check, module, facts, likely = told
    found = verdict(theme, check, bug)
    assert found.outcome == "failed", found.says
    assert (found.where.module if found.where else None) == module
    for fact in facts:
        assert fact in found.says
    assert likely in found.likely[:2]
    assert found.advice
