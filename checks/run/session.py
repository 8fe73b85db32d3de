"""One run of checks over one subject: each judged in turn and written down, and what the whole comes to.

The doors to it are plugin.py (pytest), notebook.py and, over pytest in a process of its own, supervisor.py. What it
keeps is plain data, so that it also adds up verdicts that other processes reached.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import lines, terminal
from . import BROKEN, NOTHING_TO_LEARN
from .diagnosis import where_to_start
from .expected_failures import Expected
from .order import Listed, all_listed, position
from .strength import Budget, caught_by_none_of, processor_seconds

if TYPE_CHECKING:
    from ..subject import Subject
    from .processes import Shared
    from .verdict import Verdict

EXECUTED = ("passed", *BROKEN)
LEAST_SEEN = {True: 0.25, False: 0.12}  # of all checks, by whether the model learns; seen in right models: 0.33, 0.17
NOTHING_RAN = "no check ran: this says nothing about the model"
Record = Mapping[str, Any]  # a verdict as plain data


def nowhere(record: Record) -> None:
    """For a run that writes no verdicts."""


class Session:
    """The verdicts of one run over one subject. `write` gets each record of the verdict file as it comes about.

    A check is judged after those that it needs, in whatever order they are asked for. `shared` has the verdicts of
    other processes; `budget` is in processor seconds, of each process its own.
    """

    def __init__(
        self,
        name: str,
        *,
        expected: Expected | None = None,
        slow: bool = False,
        budget: float | None = None,
        write: Callable[[Record], None] = nowhere,
        out: Path | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.name, self.slow, self.write, self.out, self.shared = name, slow, write, out, shared
        self.expected = Expected() if expected is None else expected
        self.budget = None if budget is None else Budget(budget)
        self.chosen: dict[str, Listed] = {}  # the checks of this run, by id
        self.waiting: set[str] = set()  # those that are to run and have no verdict yet, by whatever names them
        self.verdicts: dict[str, Verdict] = {}  # known to this process, by check
        self.problems: list[str] = []  # what went wrong beside the checks
        self._records: list[Record] = []  # of every process, as they came

    def choose(self, checks: Iterable[Listed]) -> None:
        """Adds checks to those of this run: a check waits for what it needs only if that runs too."""
        self.chosen |= {check.id: check for check in checks}

    def judge(self, check: Listed, subject: Subject) -> Verdict:
        """The verdict of one check, written down; a slow one is judged only in a slow run."""
        verdict = self._verdict(check, subject)
        self.write({"subject": self.name, **verdict.as_dict()})
        return verdict

    def _verdict(self, check: Listed, subject: Subject) -> Verdict:
        verdict = self.verdicts.get(check.id) or (self.shared and self.shared.get(check.id))
        if not verdict:
            verdict = self._left_out(check) or self._judged(check, subject)
            if verdict.kept and self.out is not None:
                self._keep(self.out, verdict)
        self.verdicts[check.id] = verdict
        return verdict

    def _left_out(self, check: Listed) -> Verdict | None:
        """The verdict of a check that is not to run; once one does not fit the budget, no other runs."""
        from .verdict import Verdict

        if check.slow and not self.slow:
            says = f"slow: {check.slow}; it runs with --slow, in a notebook with slow=True"
            return Verdict(check.id, check.theme, "skipped", check.rule, says)
        if self.budget is not None and not self.budget.allows(check):
            says = f"not run: it does not fit what is left of the budget of {self.budget.seconds:g} s"
            return Verdict(check.id, check.theme, "skipped", check.rule, says, {"budget": self.budget.seconds})
        return None

    def _judged(self, check: Listed, subject: Subject) -> Verdict:
        from .verdict import judge

        function = check.load()
        for needed in getattr(function, "needs", ()):
            if needed in self.chosen:
                self._verdict(self.chosen[needed], subject)
        if left_out := self._left_out(check):  # what it needs did not fit the budget
            return left_out
        self.write(lines.started(check.id, self.name))
        begun = processor_seconds()
        verdict = judge(function, subject, self.verdicts)
        if self.budget is not None and verdict.outcome in EXECUTED:
            self.budget.took(check, processor_seconds() - begun)
        if self.shared is not None:
            self.shared.put(verdict)
        return verdict

    def add(self, record: Record, name: str = "") -> None:
        """Counts a verdict, reached here or elsewhere; `name` is what `waiting` calls its check."""
        self.waiting.discard(name)
        self._records.append(record)

    # -- what the whole comes to

    @property
    def records(self) -> list[Record]:
        """The verdicts in the order of the themes, whatever order they came in."""
        return sorted(self._records, key=lambda record: position(record["check"]))

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
        if self.executed and (too_little := self._seen_too_little):
            found.append(too_little)
        if blocked and not self.broken and not self.expected_failures:
            found.append(f"not green: {blocked[0]['check']} {blocked[0]['says']}")
        return found

    @property
    def green(self) -> bool:
        """Whether checks ran, each has a verdict, and none failed that was not expected to."""
        return not self.broken and not self.complaints

    def summary(self) -> dict[str, Any]:
        """The last record of the verdict file."""
        return lines.summary(self.name, self._records, len(all_listed()))

    def ending(self) -> list[str]:
        """The last lines of a report: notes, how many checks ended how, where to start."""
        notes = [f"expected: {record['check']}: {reason}" for record, reason in self.expected_failures]
        notes += [f"note: {record['check']}: {text}" for record in self.records for text in record["remarks"]]
        summary = self.summary()["summary"]
        looked = [*terminal.not_looked_at(summary["not_looked_at"]), terminal.totals(summary), *self._left()]
        return [*notes, *looked, *self._only_sanity()]

    def _only_sanity(self) -> list[str]:
        """What the two sanity checks alone do not show."""
        if not self.executed or any(record["theme"] != "sanity" for record in self.records) or not self.green:
            return []
        return [
            "a model without a causal mask learns the sentence as well; all checks look at the rest: "
            f"pytest --model {shlex.quote(self.name)}"
        ]

    @property
    def _seen_too_little(self) -> str:
        """Of a run of all checks, that hardly any applied; "" otherwise."""
        asked = [record for record in self.records if record["outcome"] != "skipped"]
        if len(self.records) < len(all_listed()) or self.budget is not None or self.broken:
            return ""
        learns = not any(record["says"] == NOTHING_TO_LEARN for record in asked)
        if self.executed >= (least := int(LEAST_SEEN[learns] * len(asked))):
            return ""
        return f"not green: only {self.executed} of {len(asked)} checks could look at this model, fewer than {least}"

    def _left(self) -> list[str]:
        """What a budget left out, and what only that would have caught."""
        left = [record for record in self._records if "budget" in record.get("evidence", ())]
        if not left:
            return []
        missed, known = caught_by_none_of([record["check"] for record in self._records if record not in left])
        return [terminal.left_out(len(left), left[0]["evidence"]["budget"], missed, known)]

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
