"""One run of checks over one subject: each judged in turn and written down, and what the whole comes to.

The doors to it are plugin.py (pytest), notebook.py and, over pytest in a process of its own, supervisor.py. What it
keeps is plain data, so that it also adds up verdicts that other processes reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import lines, terminal
from . import BROKEN
from .diagnosis import where_to_start
from .expected_failures import Expected
from .order import Check, check_id, rule, theme

if TYPE_CHECKING:
    from ..subject import Subject
    from .verdict import Verdict

EXECUTED = ("passed", *BROKEN)
NOTHING_RAN = "no check ran: this says nothing about the model"
Record = Mapping[str, Any]  # a verdict as plain data


def nowhere(record: Record) -> None:
    """For a run that writes no verdicts."""


class Session:
    """The verdicts of one run over one subject. `write` gets each record of the verdict file as it comes about."""

    def __init__(
        self,
        name: str,
        *,
        expected: Expected | None = None,
        slow: bool = False,
        write: Callable[[Record], None] = nowhere,
        out: Path | None = None,
    ) -> None:
        self.name, self.slow, self.write, self.out = name, slow, write, out
        self.expected = Expected() if expected is None else expected
        self.total = 0  # checks that there are
        self.waiting: set[str] = set()  # those that are to run and have no verdict yet, by whatever names them
        self.verdicts: dict[str, Verdict] = {}  # of this process, by check
        self.records: list[Record] = []  # of every process
        self.problems: list[str] = []  # what went wrong beside the checks

    def judge(self, check: Check, subject: Subject) -> Verdict:
        """Judges one check and writes its verdict down; a slow one only in a slow run."""
        self.write(lines.started(check_id(check), self.name))
        verdict = self._judged(check, subject)
        self.verdicts[verdict.check] = verdict
        self.write({"subject": self.name, **verdict.as_dict()})
        if verdict.kept and self.out is not None:
            self._keep(self.out, verdict)
        return verdict

    def _judged(self, check: Check, subject: Subject) -> Verdict:
        from .verdict import Verdict, judge

        reason = getattr(check, "slow", None)
        if reason and not self.slow:
            says = f"slow: {reason}; it runs with --slow, in a notebook with slow=True"
            return Verdict(check_id(check), theme(check), "skipped", rule(check), says)
        return judge(check, subject, self.verdicts)

    def add(self, record: Record, name: str = "") -> None:
        """Counts a verdict, reached here or elsewhere; `name` is what `waiting` calls its check."""
        self.waiting.discard(name)
        self.records.append(record)

    # -- what the whole comes to

    @property
    def broken(self) -> list[Record]:
        """What failed or crashed unexpectedly."""
        return [record for record in self.records if record["outcome"] in BROKEN and self.reason(record) is None]

    @property
    def expected_failures(self) -> list[tuple[Record, str]]:
        """What failed as expected, with the reasons."""
        found = ((record, self.reason(record)) for record in self.records)
        return [(record, reason) for record, reason in found if reason is not None]

    def reason(self, record: Record) -> str | None:
        return self.expected.reason(record)

    @property
    def executed(self) -> int:
        return sum(record["outcome"] in EXECUTED for record in self.records)

    @property
    def complaints(self) -> list[str]:
        """Why the run is not green though nothing failed."""
        found = self.expected.complaints(self.records)
        if not self.executed:
            found.append(NOTHING_RAN)
        if left := sorted(self.waiting):
            some = ", ".join(name.rpartition("::")[2] for name in left[:3]) + ", …" * (len(left) > 3)
            found.append(f"not green: no verdict from {len(left)} of the checks of {self.name}: {some}")
        blocked = [record for record in self.records if record["outcome"] == "blocked"]
        if blocked and not self.broken and not self.expected_failures:
            found.append(f"not green: {blocked[0]['check']} {blocked[0]['says']}")
        return found

    @property
    def green(self) -> bool:
        """Whether checks ran, each has a verdict, and none failed that was not expected to."""
        return not self.broken and not self.complaints

    def summary(self) -> dict[str, Any]:
        """The last record of the verdict file."""
        return lines.summary(self.name, self.records, self.total or len(self.records))

    def ending(self) -> list[str]:
        """The last lines of a report: notes, how many checks ended how, where to start."""
        notes = [f"expected: {record['check']}: {reason}" for record, reason in self.expected_failures]
        notes += [f"note: {record['check']}: {text}" for record in self.records for text in record["remarks"]]
        return [*notes, terminal.totals(self.summary()["summary"])]

    def start(self) -> str:
        """Which unexpected failure to look at first."""
        return where_to_start(self.broken)

    # -- artifacts of the sanity checks

    def _keep(self, out: Path, verdict: Verdict) -> None:
        from ...transformer.checkpoint import CheckpointError
        from . import sanity_artifacts

        try:
            sanity_artifacts.save_run(out, verdict)
        except (OSError, CheckpointError) as error:
            self._unwritable(out, error)

    def draw(self) -> list[Path]:
        """Writes the pictures and the report of the sanity checks, once, at the end; what was written."""
        if self.out is None or not any(verdict.kept for verdict in self.verdicts.values()):
            return []
        from . import sanity_artifacts

        try:
            return sanity_artifacts.finish(self.out, self.name, self.verdicts.values())
        except OSError as error:
            self._unwritable(self.out, error)
            return []

    def _unwritable(self, out: Path, error: Exception) -> None:
        """A verdict stands whether or not its artifacts could be kept."""
        message = f"artifacts under {out} are incomplete: {error}"
        if message not in self.problems:
            self.problems.append(message)
