"""One run in several processes (pytest-xdist): what they share, and which check goes to which.

Each process judges its checks as one process alone would. A prerequisite whose verdict no other process has written yet
is judged where it is needed; it is reported once, by the process that it was given to.
"""

from __future__ import annotations

import contextlib
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .verdict import Verdict

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling


class Shared:
    """The verdicts of one subject in a folder that all processes of a run read and write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, id: str) -> Verdict | None:
        """The verdict of a check, None if no process has written one."""
        try:
            with open(self.folder / id, "rb") as file:
                verdict: Verdict = pickle.load(file)
                return verdict
        except OSError:
            return None

    def put(self, verdict: Verdict) -> None:
        """Writes a verdict for the others; where it cannot be written, they judge the check themselves."""
        unfinished = self.folder / f"{verdict.check}.{os.getpid()}"
        with contextlib.suppress(OSError, pickle.PicklingError, TypeError, AttributeError):
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(pickle.dumps(replace(verdict, kept={})))
            unfinished.replace(self.folder / verdict.check)


def scheduler(config: Any, log: Any) -> LoadScopeScheduling:
    """Hands out checks one by one in the order in which they are to run, the sanity checks of a model together.

    They share a report with both learning curves, and only the process that trained a model has its curve.
    """
    from xdist.scheduler import LoadScopeScheduling

    class InOrder(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            return f"{file}[{name.partition('[')[2]}" if file.endswith("check_sanity.py") else nodeid

        def remove_node(self, node: Any) -> str | None:
            """Without the check in which it died, which would only kill the next one."""
            units = self.assigned_work[node].values()
            died: str | None = next((id for unit in units for id, done in unit.items() if not done), None)
            for unit in units:
                if died in unit:
                    unit[died] = True
            super().remove_node(node)
            return died

    config.option.loadscopereorder = False  # it would begin with the sanity checks, the only two that go together
    return InOrder(config, log)
