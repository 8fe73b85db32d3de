"""The verdict file: one JSON line per verdict, written as it happens, with a `started` line before each check."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COUNTED = ("passed", "failed", "error", "not_applicable", "skipped", "blocked")


def line(record: Mapping[str, Any]) -> str:
    """A record as one line of strict JSON: values that JSON lacks (NaN, infinities, other types) become text."""
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """The same of nothing but what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def started(check: str, subject: str) -> dict[str, Any]:
    """The line written before a check runs, so that a crash or a hang names it."""
    return {"started": check, "subject": subject}


def summary(subject: str, verdicts: Iterable[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """The last line: how many checks there are, how many ran, and how they ended."""
    verdicts = list(verdicts)
    outcomes = [verdict["outcome"] for verdict in verdicts]
    counts = {outcome: outcomes.count(outcome) for outcome in COUNTED}
    executed = sum(counts[outcome] for outcome in ("passed", "failed", "error"))
    applicable = executed + counts["blocked"] + counts["skipped"]
    known = {"subject": subject, "executed": executed, "applicable": applicable, "total": total}
    return {"summary": {**known, **counts, "not_looked_at": not_looked_at(verdicts)}}


def not_looked_at(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Why checks said nothing about the model, with the number of checks, most first; of those that wait, for what."""
    waits = {v["check"]: _needed(v["says"]) for v in verdicts if v["outcome"] == "blocked"}
    found: dict[str, int] = {}
    for verdict in verdicts:
        if verdict["outcome"] not in ("not_applicable", "blocked"):
            continue
        reason = verdict["says"].partition("\n")[0]
        if unless := verdict["evidence"].get("unless"):
            reason += f" ({unless} would change that)"
        if verdict["outcome"] == "blocked":
            root = waits[verdict["check"]]
            while root in waits:
                root = waits[root]
            reason = f"they wait for {root}, which did not pass"
        found[reason] = found.get(reason, 0) + 1
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _needed(says: str) -> str:
    """The check that a blocked one waits for."""
    return says.removeprefix("needs ").partition(",")[0]
