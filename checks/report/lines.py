"""The verdict file: one JSON line per verdict, written as it happens, with a `started` line before each check."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
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
    outcomes = [verdict["outcome"] for verdict in verdicts]
    counts = {outcome: outcomes.count(outcome) for outcome in COUNTED}
    executed = sum(counts[outcome] for outcome in ("passed", "failed", "error"))
    applicable = executed + counts["blocked"] + counts["skipped"]
    return {"summary": {"subject": subject, "executed": executed, "applicable": applicable, "total": total, **counts}}
