"""What to make of the failures of a run: which one to look at first, and what its likely causes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.terminal import place
from . import BROKEN


def where_to_start(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Which of the broken rules to look at first: a crash, otherwise the first in the order of the checks."""
    broken = [verdict for verdict in verdicts if verdict["outcome"] in BROKEN]
    if not broken:
        return ""
    first = next((verdict for verdict in broken if verdict["outcome"] == "error"), broken[0])
    at = f" at {place(first['where'])}" if first.get("where") else ""
    return f"start with {first['check']}{at}" if len(broken) > 1 else f"{first['check']}{at}"


def explain(bug: str) -> str:
    """A known bug's id with what it is."""
    from ..bugs import all_bugs

    known = all_bugs().get(bug)
    return f"{bug}: {known.says}" if known else bug
