"""Every check of one model without pytest, and the report that a notebook's cell shows."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from ..meet.errors import UsageError
from ..report import terminal
from ..subject import Subject
from . import BROKEN
from .diagnosis import explain
from .expected_failures import read
from .live import Live
from .order import THEMES, Listed, all_listed, listed, position
from .session import Session
from .strength import in_order
from .subjects import subject_of
from .verdict import Verdict


class Report:
    """The verdicts of one run: iterable, `passed`, and readable as text."""

    def __init__(self, subject: Subject, session: Session) -> None:
        self.subject, self.session = subject, session

    @property
    def verdicts(self) -> list[Verdict]:
        return sorted(self.session.verdicts.values(), key=lambda verdict: position(verdict.check))

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
        """What failed or crashed unexpectedly."""
        names = {record["check"] for record in self.session.broken}
        return [verdict for verdict in self.verdicts if verdict.check in names]

    @property
    def passed(self) -> bool:
        """Whether checks ran, each has a verdict, and none failed that was not expected to."""
        return self.session.green

    def __repr__(self) -> str:
        parts = [f"{self.subject.header} · seed {self.subject.seed}"]
        parts += [terminal.failure(record, explain) for record in self.session.broken]
        end = [*self.session.ending(), *self.session.complaints, self.session.start()]
        return "\n\n".join([*parts, "\n".join(line for line in end if line)])


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
    budget: float | None = None,
    **parts: Any,
) -> Report:
    """See `transformer_checks.check_model`."""
    parts = {name: part for name, part in parts.items() if part is not None}
    chosen = _chosen(checks)
    seed = secrets.randbelow(2**31) if seed is None else seed
    subject = subject_of(model, parts=parts, seed=seed, device=device, causal=causal, checkpoint=checkpoint, spec=spec)
    expected = None if expected_failures is None else read(expected_failures, all_listed())
    session = Session(subject.name, expected=expected, slow=slow, budget=budget)
    session.choose(chosen)
    live = Live(len(chosen))
    try:
        for check in in_order(chosen):
            live.start(check.id)
            record = session.judge(check, subject).as_dict()
            session.add(record)
            if record["outcome"] in BROKEN and session.reason(record) is None:
                live.finding(terminal.failure(record, explain))
    finally:
        live.end()
        subject.leave()
    return Report(subject, session)


def _chosen(wanted: Iterable[str] | None) -> list[Listed]:
    """Checks by theme ("causality") or by name; all of them by default."""
    known = list(all_listed().values())
    if wanted is None:
        return known
    found: list[Listed] = []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        mine = listed(name) if name in THEMES else [check for check in known if name in (check.id, check.name)]
        if not mine:
            raise UsageError(f"no check or theme is called {name!r}; the themes are {', '.join(THEMES)}")
        found += [check for check in mine if check not in found]
    return found
