"""What every transformer language model must satisfy, as checks of a subject.

`all_checks()` are the checks in the order in which they run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

# Themes in the order in which they run: each may need those before it.
THEMES = (
    "contract", "modes", "causality", "masking", "positions",
    "initialization", "gradients", "numerics", "portability",
    "loss", "cache", "generation", "sampling",
    "training", "optimizer", "evaluation", "data", "checkpoint", "spec", "sanity",
)  # fmt: skip


def all_checks() -> list[Callable]:
    """Every function `check_*` of every `check_*.py`, by theme and then as written."""
    return [check for theme in THEMES for check in checks_in(theme)]


def checks_in(theme: str) -> list[Callable]:
    """The checks of one theme, as written; none where the theme has no file."""
    if not (Path(__file__).parent / f"check_{theme}.py").exists():
        return []
    module = importlib.import_module(f"checks.check_{theme}")
    return [
        check
        for name, check in vars(module).items()
        if name.startswith("check_") and inspect.isfunction(check) and check.__module__ == module.__name__
    ]
