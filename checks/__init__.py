"""What every transformer language model must satisfy, as checks of a subject.

`check_model()` runs them without pytest; `all_checks()` are the checks by theme.
"""

from __future__ import annotations

if __name__ == "checks":  # the folder of a checkout, imported by its own name
    raise ImportError("write `from transformer_checks import check_model`: `pip install -e .` installs it by that name")

from typing import TYPE_CHECKING, Any

from .run.order import THEMES, all_checks

if TYPE_CHECKING:
    from .run.notebook import Report

__all__ = ["THEMES", "all_checks", "check_model"]


def check_model(model: Any, **how: Any) -> Report:
    """Every check of a model, for notebooks and scripts: `report = check_model(model)`.

    `model` is an nn.Module (tested at its own sizes and put back as it was), a class or a factory such as
    `build_model(vocab_size, block_size)`, or what `--model` takes: "FILE.py[:NAME]", "package.module:NAME".
    Its other parts: `loss=`, `generate=`, `train_step=`, `trainer=`, `tokenizer=`, as functions or "FILE:NAME".
    Also `checks=` (themes or names; all by default), `seed=`, `device=`, `causal=`, `checkpoint=`, `slow=`,
    `spec=` ("gpt2", "llama", "gpt2:FILE.json"), `expected_failures=FILE` and `budget=` (processor seconds: the checks
    that catch most come first, and the report says what was left out). The report is iterable, readable as text, and
    has `report.passed`. In a notebook and on a terminal the first finding is printed as it is found.
    Raises UsageError, a ValueError, for a model that cannot be loaded.
    """
    from .run.notebook import check_model

    return check_model(model, **how)
