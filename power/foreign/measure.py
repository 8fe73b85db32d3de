"""Judges one bug in one form: first by the checks that its entry in the catalogue names, then by all others."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.meet.errors import UsageError
from transformer_checks.checks.run.order import Check, check_id
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

from . import FALSE_ALARMS, FORMS, source_of
from .edit import Edit
from .edits import all_edits

CHECKS: dict[str, Check] = {check_id(check): check for check in all_checks() if not hasattr(check, "slow")}
RESULTS = ("its check", "kin", "another check", "error", "refused", "missed")


def edit_for(bug: str, form: str) -> Edit | None:
    """The edit that puts this bug into this form; None where the form does not have what it damages."""
    return next((edit for edit in all_edits()[bug] if edit.fits(form, source_of(form))), None)


def forms_of(bug: str) -> list[str]:
    return [form for form in FORMS if edit_for(bug, form)]


def damaged(bug: str, form: str) -> str:
    """The text of the form with the bug."""
    edit = edit_for(bug, form)
    assert edit is not None, f"{bug} has no edit for {form}"
    return edit.made_in(source_of(form))


def judged(bug: str, form: str, *, seed: int = 0, everything: bool = True) -> dict[str, Any]:
    """A row of the table: what caught the bug, "its check", "kin" (of the same theme) or "another check"; or nothing.

    Without `everything`, only the checks that the bug names are asked, with those that they need.
    """
    begun = time.monotonic()
    row: dict[str, Any] = {"bug": bug, "form": form, "seed": seed, "check": "", "likely": False, "says": ""}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{form}.py")
        path.write_text(damaged(bug, form), encoding="utf-8")
        try:
            verdicts = list(_verdicts(subject_of(str(path), seed=seed, spec=FORMS[form]), bug, form, everything))
        except UsageError as error:
            return {**row, "result": "refused", "says": str(error)[:300], "seconds": round(time.monotonic() - begun, 1)}
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    broken = failed or [verdict for verdict in verdicts if verdict.outcome == "error"]
    if broken:
        named = [verdict for verdict in broken if verdict.check in all_bugs()[bug].caught_by]
        told = (named or broken)[0]
        row |= {"check": told.check, "says": told.says[:300]}
        row["likely"] = any(bug in verdict.likely for verdict in broken)
    row["result"] = _result(bug, row["check"]) if failed else "error" if broken else "missed"
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def _result(bug: str, check: str) -> str:
    """By which kind of check a bug was caught."""
    named = all_bugs()[bug].caught_by
    themes = {name.partition(".")[0] for name in named}
    return "its check" if check in named else "kin" if check.partition(".")[0] in themes else "another check"


def _verdicts(subject: Subject, bug: str, form: str, everything: bool) -> Iterator[Verdict]:
    """The verdicts of the named checks and of what they need; then, unless one failed, of all up to the first."""
    earlier: dict[str, Verdict] = {}
    silent = FALSE_ALARMS.get(form, ())
    for names in (with_needs(all_bugs()[bug].caught_by), CHECKS if everything else ()):
        for name in names:
            if name in CHECKS and name not in earlier and name not in silent:
                verdict = earlier[name] = judge(CHECKS[name], subject, earlier)
                yield verdict
                if verdict.outcome == "failed" and names is CHECKS:
                    return
        if any(verdict.outcome == "failed" for verdict in earlier.values()):
            return


def with_needs(names: Iterable[str]) -> list[str]:
    """These checks in the order in which they run, each after those that it needs."""
    wanted = list(names)
    for name in wanted:  # it grows
        wanted += [needed for needed in getattr(CHECKS.get(name), "needs", ()) if needed not in wanted]
    return [name for name in CHECKS if name in wanted]
