"""What every transformer language model must satisfy, as checks of a subject.

`check_model()` runs them without pytest; `all_checks()` are the checks in the order in which they run.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run.notebook import Report

# Themes in the order in which they run: each may need those before it.
THEMES = (
    "contract", "modes", "causality", "masking", "positions",
    "initialization", "gradients", "parts", "numerics", "portability", "devices", "distributed",
    "loss", "cache", "generation", "sampling",
    "training", "optimizer", "evaluation", "data", "checkpoint", "spec", "memorization", "sanity",
)  # fmt: skip


def all_checks() -> list[Callable]:
    """Every function `check_*` of every `check_*.py`, by theme and then as written."""
    return [check for theme in THEMES for check in checks_in(theme)]


def checks_in(theme: str) -> list[Callable]:
    """The checks of one theme, as written; none where the theme has no file."""
    if not (Path(__file__).parent / f"check_{theme}.py").exists():
        return []
    module = importlib.import_module(f"{__name__}.check_{theme}")
    return [
        check
        for name, check in vars(module).items()
        if name.startswith("check_") and inspect.isfunction(check) and check.__module__ == module.__name__
    ]


def check_model(model: Any, **how: Any) -> Report:
    """Every check of a model, for notebooks and scripts: `report = check_model(model)`.

    `model` is an nn.Module (tested at its own sizes and put back as it was), a class or a factory such as
    `build_model(vocab_size, block_size)`, or what `--model` takes: "FILE.py[:NAME]", "package.module:NAME".
    What comes with it: `loss=`, `generate=`, `train_step=`, `trainer=`, `tokenizer=`, as functions or "FILE:NAME".
    Also `checks=` (themes or names; all by default), `seed=`, `device=`, `causal=`, `checkpoint=`, `slow=`,
    `spec=` ("gpt2", "llama", "gpt2:FILE.json") and `expected_failures=FILE`. The report is iterable, readable as text,
    and has `report.passed`.
    Raises UsageError, a ValueError, for what cannot be met.
    """
    from .run.notebook import check_model

    return check_model(model, **how)
