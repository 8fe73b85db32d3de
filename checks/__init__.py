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
    "contract", "causality", "masking", "initialization", "gradients", "numerics", "portability",
    "loss", "generation", "training", "checkpoint", "spec", "sanity",
)  # fmt: skip


def all_checks() -> list[Callable]:
    """Every function `check_*` of every `check_*.py`, by theme and then as written."""
    found = []
    for name in THEMES:
        if (Path(__file__).parent / f"check_{name}.py").exists():
            module = importlib.import_module(f"checks.check_{name}")
            found += [
                check
                for key, check in vars(module).items()
                if key.startswith("check_") and inspect.isfunction(check) and check.__module__ == module.__name__
            ]
    return found
