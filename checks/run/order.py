"""Which checks there are, and the order in which they run."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from ..subject import Subject

Check: TypeAlias = "Callable[[Subject], None]"
CHECKS = Path(__file__).parent.parent
PACKAGE = __name__.removesuffix(".run.order")

# Themes in the order in which they run: each may need those before it.
THEMES = (
    "contract", "modes", "causality", "masking", "positions",
    "initialization", "gradients", "parts", "numerics", "portability", "devices", "distributed",
    "loss", "cache", "generation", "sampling",
    "training", "optimizer", "evaluation", "data", "checkpoint", "spec", "memorization", "sanity",
)  # fmt: skip


def all_checks() -> list[Check]:
    """Every function `check_*` of every `check_*.py`, by theme and then as written."""
    return [check for theme in THEMES for check in checks_in(theme)]


def checks_in(theme: str) -> list[Check]:
    """The checks of one theme, as written; none where the theme has no file."""
    if not (CHECKS / f"check_{theme}.py").exists():
        return []
    module = importlib.import_module(f"{PACKAGE}.check_{theme}")
    return [
        check
        for name, check in vars(module).items()
        if name.startswith("check_") and inspect.isfunction(check) and check.__module__ == module.__name__
    ]


def check_id(check: Check) -> str:
    """`check_causality.check_future_cannot_change_past`."""
    return f"{check.__module__.rpartition('.')[2]}.{check.__name__}"


def theme(check: Check) -> str:
    """`causality`."""
    return check.__module__.rpartition(".")[2].removeprefix("check_")


def rule(check: Check) -> str:
    """The check's sentence: the first paragraph of its docstring."""
    return " ".join((check.__doc__ or check.__name__).strip().split("\n\n")[0].split())
