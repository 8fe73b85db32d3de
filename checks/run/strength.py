"""In which order checks run, and how far a budget goes: first those that catch the most known bugs per second.

strength.json says how long each check takes and which known bugs it catches; `python -m power.strength` writes it, in
the order in which to run, which keeps every check behind those that it needs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from .order import Listed, position

FILE = Path(__file__).parent / "strength.json"


@dataclass(frozen=True)
class Strength:
    """What was measured of one check."""

    seconds: float  # of a processor, on the reference
    catches: frozenset[int]  # known bugs, by number


LEAST = 0.001  # seconds that any check costs
UNKNOWN = Strength(0.0, frozenset())  # of a check that is new or slow


@cache
def strengths() -> dict[str, Strength]:
    """By check id, in the order in which to run."""
    text = FILE.read_text(encoding="utf-8")
    return {id: Strength(seconds, frozenset(bugs)) for id, (seconds, bugs) in json.loads(text)["checks"].items()}


@cache
def _ranks() -> dict[str, int]:
    return {id: rank for rank, id in enumerate(strengths())}


def rank(id: str) -> tuple[int, int]:
    """Sorts checks as they are to run; those of which nothing was measured come last, by theme."""
    return _ranks().get(id, len(_ranks())), position(id)


def in_order(checks: Iterable[Listed]) -> list[Listed]:
    """The checks as they are to run."""
    return sorted(checks, key=lambda check: rank(check.id))


def caught_by_none_of(ran: Collection[str]) -> tuple[int, int]:
    """How many of the known bugs none of these checks catches, though another does, and how many any check catches."""
    every = frozenset[int]().union(*(found.catches for found in strengths().values()))
    caught = frozenset[int]().union(*(strengths().get(id, UNKNOWN).catches for id in ran))
    return len(every - caught), len(every)


def processor_seconds() -> float:
    """Of this process and of those that it waited for."""
    return time.process_time() + sum(os.times()[2:4])


class Budget:
    """Processor seconds for the checks of a run, from the first of them on, what they import included."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, False
        self.begun: float | None = None
        self.slower: list[float] = []  # how many times as long as on the reference each check took that ran

    def allows(self, check: Listed) -> bool:
        """Whether a check fits what is left, by what it takes on the reference and how much slower this model is.

        After the first that does not, none does: a check must not run where one that it needs did not.
        """
        now = processor_seconds()
        self.begun = now if self.begun is None else self.begun
        # The median: whoever comes first also pays for what torch imports on first use.
        slower = max(1.0, median(self.slower or [1.0]))
        until = now - self.begun + slower * strengths().get(check.id, UNKNOWN).seconds
        self.spent = self.spent or until >= self.seconds
        return not self.spent

    def took(self, check: Listed, seconds: float) -> None:
        """Notes what a check took that ran to its end."""
        if known := strengths().get(check.id):
            self.slower.append(seconds / max(known.seconds, LEAST))
