"""Expected failures: a file of lines `check: reason`, for checks that a model is known to fail.

A line without a reason, a check that does not exist and an expected failure that passes are errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..meet.errors import UsageError
from . import BROKEN

FORM = "expected `check: reason`, as in check_portability.check_copies_share_nothing: the cache is shared on purpose"


@dataclass(frozen=True)
class Expected:
    """The reasons by check id, `check_causality.check_future_cannot_change_past`."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    file: str = ""

    def reason(self, verdict: Mapping[str, Any]) -> str | None:
        """Why this failure was expected; None if the verdict is no failure or was not expected."""
        return self.reasons.get(verdict["check"]) if verdict["outcome"] in BROKEN else None

    def complaints(self, verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
        """Checks that were expected to fail and passed."""
        return [
            f"{verdict['check']} was expected to fail ({self.reasons[verdict['check']]}) and passed: "
            f"remove its line from {self.file}"
            for verdict in verdicts
            if verdict["outcome"] == "passed" and verdict["check"] in self.reasons
        ]


def read(path: str, known: Iterable[str]) -> Expected:
    """Reads the file; empty lines and lines that begin with # are ignored. `known` are the ids of all checks.

    A check may be named without its theme if the name is unique. Raises UsageError, naming the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--expected-failures {path}: {getattr(error, 'strerror', None) or error}") from None
    reasons: dict[str, str] = {}
    checks = list(known)
    for number, name, reason in _entries(lines):
        where = f"{path}:{number}"
        if not reason:
            raise UsageError(f"{where}: no reason for {name!r}; {FORM}")
        check = _known(name, checks, where)
        if check in reasons:
            raise UsageError(f"{where}: {check} is listed twice")
        reasons[check] = reason
    return Expected(reasons, path)


def _entries(lines: list[str]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, _, reason = line.partition(":")
            yield number, name.strip(), reason.strip()


def _known(name: str, checks: list[str], where: str) -> str:
    found = [check for check in checks if check == name or check.rpartition(".")[2] == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{where}: {name!r} names several checks: {', '.join(found)}")
    near = difflib.get_close_matches(name, [*checks, *(c.rpartition(".")[2] for c in checks)], n=3)
    raise UsageError(f"{where}: no check is called {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
