"""Judges one bug in one form: first by the checks that its entry in the catalogue names, then by all others."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.meet.errors import UsageError
from transformer_checks.checks.run.order import Check, check_id
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

from . import FORMS, source_of
from .edit import Edit
from .edits import all_edits

CHECKS: dict[str, Check] = {check_id(check): check for check in all_checks() if not hasattr(check, "slow")}
RESULTS = ("its check", "kin", "another check", "advice", "error", "refused", "missed")


@dataclass(frozen=True)
class Case:
    """One bug in one form, and how it is judged."""

    bug: str
    form: str
    seed: int = 0
    declared: bool = True  # whether the checks are told which architecture the form is

    @property
    def named(self) -> tuple[str, ...]:
        """The checks that must fail on this bug in the reference."""
        return all_bugs()[self.bug].caught_by

    @property
    def source(self) -> str:
        """The text of the form with the bug."""
        edit = edit_for(self.bug, self.form)
        assert edit is not None, f"{self.bug} has no edit for {self.form}"
        return edit.made_in(source_of(self.form))


def edit_for(bug: str, form: str) -> Edit | None:
    """The edit that puts this bug into this form; None where the form does not have what it damages."""
    return next((edit for edit in all_edits()[bug] if edit.fits(form, source_of(form))), None)


def forms_of(bug: str) -> list[str]:
    return [form for form in FORMS if edit_for(bug, form)]


def judged(case: Case, *, everything: bool = True) -> dict[str, Any]:
    """A row of the table: what caught the bug, "its check", "kin" (of the same theme) or "another check"; or nothing.

    Without `everything`, only the checks that the bug names are asked, with those that they need.
    """
    begun = time.monotonic()
    row: dict[str, Any] = {**asdict(case), "check": "", "likely": False, "says": ""}
    try:
        row |= _outcome(case, verdicts(case, case.source, everything))
    except UsageError as error:
        row |= {"result": "refused", "says": str(error)[:300]}
    if row["result"] == "missed" and (told := advice(case)):
        row |= {"result": "advice", "says": told[:300]}
    return row | {"seconds": round(time.monotonic() - begun, 1)}


def _outcome(case: Case, found: list[Verdict]) -> dict[str, Any]:
    failed = [verdict for verdict in found if verdict.outcome == "failed"]
    broken = failed or [verdict for verdict in found if verdict.outcome == "error"]
    if not broken:
        return {"result": "missed"}
    told = next((verdict for verdict in broken if verdict.check in case.named), broken[0])
    themes = {name.partition(".")[0] for name in case.named}
    result = "its check" if told.check in case.named else "another check"
    if result == "another check" and told.check.partition(".")[0] in themes:
        result = "kin"
    likely = any(case.bug in verdict.likely for verdict in broken)
    return {"result": result if failed else "error", "check": told.check, "likely": likely, "says": told.says[:300]}


def advice(case: Case) -> str:
    """What the named checks remark about the damaged form and not about the right one; "" if nothing."""
    remarks = [
        {text: None for verdict in verdicts(case, source, False) for text in verdict.remarks}
        for source in (case.source, source_of(case.form))
    ]
    return next((text for text in remarks[0] if text not in remarks[1]), "")


def verdicts(case: Case, source: str, everything: bool) -> list[Verdict]:
    """Those of the checks that the bug names, of what they need, and, with `everything`, of all until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{case.form}.py")
        path.write_text(source, encoding="utf-8")
        spec = FORMS[case.form] if case.declared else "auto"
        return list(_verdicts(case, subject_of(str(path), seed=case.seed, spec=spec), everything))


def _verdicts(case: Case, subject: Subject, everything: bool) -> Iterator[Verdict]:
    earlier: dict[str, Verdict] = {}
    for names in (with_needs(case.named), CHECKS if everything else ()):
        for name in names:
            if name in CHECKS and name not in earlier:
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
