"""Every check of one model without pytest, and the report that a notebook's cell shows."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..meet.errors import UsageError
from ..report import lines, terminal
from ..subject import Subject
from .expected_failures import Expected, read
from .order import THEMES, all_checks, check_id, checks_in, rule, theme
from .subjects import subject_of
from .verdict import Verdict, judge

BROKEN = ("failed", "error")


class Report:
    """The verdicts of one run: iterable, `passed`, and readable as text."""

    def __init__(self, subject: Subject, verdicts: list[Verdict], expected: Expected) -> None:
        self.subject, self.verdicts, self.expected = subject, verdicts, expected

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, name: str) -> Verdict:
        """The verdict of a check, by its id or by its name alone."""
        for verdict in self.verdicts:
            if name in (verdict.check, verdict.check.rpartition(".")[2]):
                return verdict
        raise KeyError(name)

    @property
    def broken(self) -> list[Verdict]:
        """What failed or crashed, but for what was expected to."""
        return [v for v in self.verdicts if v.outcome in BROKEN and self.expected.reason(v.as_dict()) is None]

    @property
    def executed(self) -> int:
        return sum(v.outcome in ("passed", *BROKEN) for v in self.verdicts)

    @property
    def complaints(self) -> list[str]:
        """Why the run is not green though nothing failed."""
        found = self.expected.complaints(v.as_dict() for v in self.verdicts)
        return found if self.executed else [*found, "no check ran: this says nothing about the model"]

    @property
    def passed(self) -> bool:
        """Whether checks ran, every one that applies did, and none failed unexpectedly."""
        blocked = any(v.outcome == "blocked" for v in self.verdicts)
        return not self.broken and not self.complaints and not (blocked and not self._expected)

    @property
    def _expected(self) -> list[tuple[Verdict, str]]:
        found = ((v, self.expected.reason(v.as_dict())) for v in self.verdicts)
        return [(verdict, reason) for verdict, reason in found if reason is not None]

    def __repr__(self) -> str:
        verdicts = [v.as_dict() for v in self.verdicts]
        parts = [f"{self.subject.header} · seed {self.subject.seed}"]
        parts += [terminal.failure(v.as_dict(), explain) for v in self.broken]
        notes = [f"expected: {v.check}: {reason}" for v, reason in self._expected]
        notes += [f"note: {v.check}: {remark}" for v in self.verdicts for remark in v.remarks]
        counts = lines.summary(self.subject.name, verdicts, len(verdicts))["summary"]
        end = [*notes, terminal.totals(counts), *self.complaints, terminal.where_to_start(verdicts)]
        return "\n\n".join([*parts, "\n".join(line for line in end if line)])


def explain(bug: str) -> str:
    from ..bugs import all_bugs

    known = all_bugs().get(bug)
    return f"{bug}: {known.says}" if known else bug


def check_model(
    model: Any,
    *,
    checks: Iterable[str] | None = None,
    expected_failures: str | None = None,
    seed: int | None = None,
    device: str = "cpu",
    causal: bool = True,
    checkpoint: str | None = None,
    slow: bool = False,
    spec: str = "auto",
    **parts: Any,
) -> Report:
    """See `checks.check_model`."""
    parts = {name: part for name, part in parts.items() if part is not None}
    chosen = _chosen(checks)
    seed = secrets.randbelow(2**31) if seed is None else seed
    subject = subject_of(model, parts=parts, seed=seed, device=device, causal=causal, checkpoint=checkpoint, spec=spec)
    expected = Expected() if expected_failures is None else read(expected_failures, map(check_id, all_checks()))
    earlier: dict[str, Verdict] = {}
    try:
        for check in chosen:
            verdict = _judge(check, subject, earlier, slow)
            earlier[verdict.check] = verdict
    finally:
        subject.leave()
    return Report(subject, list(earlier.values()), expected)


def _judge(check: Callable, subject: Subject, earlier: Mapping[str, Verdict], slow: bool) -> Verdict:
    reason = getattr(check, "slow", None)
    if reason and not slow:
        return Verdict(check_id(check), theme(check), "skipped", rule(check), f"slow: {reason}; slow=True runs it")
    return judge(check, subject, earlier)


def _chosen(wanted: Iterable[str] | None) -> list[Callable]:
    """Checks by theme ("causality") or by name; all of them by default."""
    if wanted is None:
        return all_checks()
    found: list[Callable] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        mine = checks_in(name) if name in THEMES else [c for c in all_checks() if name in (check_id(c), c.__name__)]
        if not mine:
            raise UsageError(f"no check or theme is called {name!r}; the themes are {', '.join(THEMES)}")
        found += [check for check in mine if check not in found]
    return found
