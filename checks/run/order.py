"""Which checks there are, by theme and as written.

They are read from the source text: only a check that runs is imported, with what its theme needs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ..subject import Subject

Check: TypeAlias = "Callable[[Subject], None]"
CHECKS = Path(__file__).parent.parent
PACKAGE = __name__.removesuffix(".run.order")

# Themes in the order in which a report shows them: each may need those before it.
THEMES = (
    "contract", "modes", "causality", "masking", "paths", "positions", "options", "randomness",
    "initialization", "gradients", "parts", "attention", "experts", "numerics", "portability", "devices", "distributed",
    "loss", "targets", "preference", "cache", "generation", "sampling", "decoding",
    "training", "optimizer", "schedule", "average", "evaluation", "data", "checkpoint", "spec",
    "memorization", "sanity",
)  # fmt: skip

# The decorators of a check, its name, and the first paragraph of its docstring.
DEFINITION = re.compile(
    r'(?P<decorators>(?:^[@ )][^\n]*\n)*)^def (?P<name>check_\w+)\(.*?\n    """(?P<rule>.*?)(?:\n\s*\n|""")',
    re.MULTILINE | re.DOTALL,
)
SLOW = re.compile(r'^@slow\("(.*?)"\)', re.MULTILINE)


@dataclass(frozen=True)
class Listed:
    """A check as the source text names it. `load` imports it."""

    theme: str  # causality
    name: str  # check_future_cannot_change_past
    line: int  # of its file, from 1
    rule: str  # its sentence, the first paragraph of its docstring
    slow: str = ""  # why it stays out of the default run

    @property
    def id(self) -> str:
        """`check_causality.check_future_cannot_change_past`."""
        return f"check_{self.theme}.{self.name}"

    def load(self) -> Check:
        check: Check = getattr(importlib.import_module(f"{PACKAGE}.check_{self.theme}"), self.name)
        return check


@cache
def listed(theme: str) -> tuple[Listed, ...]:
    """The checks of one theme, as written; none where the theme has no file."""
    path = CHECKS / f"check_{theme}.py"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = []
    for match in DEFINITION.finditer(text):
        line = text.count("\n", 0, match.start("name")) + 1
        slow = SLOW.search(match["decorators"])
        found.append(Listed(theme, match["name"], line, " ".join(match["rule"].split()), slow[1] if slow else ""))
    return tuple(found)


@cache
def all_listed() -> dict[str, Listed]:
    """Every check by its id, by theme and then as written."""
    return {check.id: check for theme in THEMES for check in listed(theme)}


@cache
def _positions() -> dict[str, int]:
    return {id: position for position, id in enumerate(all_listed())}


def position(id: str) -> int:
    """Where a report shows the verdict of this check; what is no check of ours comes last."""
    return _positions().get(id, len(_positions()))


def all_checks() -> list[Check]:
    """Every function `check_*` of every `check_*.py`, by theme and then as written."""
    return [check.load() for check in all_listed().values()]


def checks_in(theme: str) -> list[Check]:
    """The checks of one theme, as written."""
    return [check.load() for check in listed(theme)]


def check_id(check: Check) -> str:
    """`check_causality.check_future_cannot_change_past`."""
    return f"{check.__module__.rpartition('.')[2]}.{check.__name__}"


def theme(check: Check) -> str:
    """`causality`."""
    return check.__module__.rpartition(".")[2].removeprefix("check_")


def rule(check: Check) -> str:
    """The check's sentence: the first paragraph of its docstring."""
    return " ".join((check.__doc__ or check.__name__).strip().split("\n\n")[0].split())
