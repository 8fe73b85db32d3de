"""Which function of a student's file is its loss, where none is called `loss`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

LOSS = re.compile(r"(^|_)(loss|nll|cross_?entropy)(_|$)", re.IGNORECASE)
ANOTHERS = re.compile(
    r"plot|log|print|eval|estim|train|valid|test|record|save|aux|balanc|distil|contrast|triplet|reward"
)
LOGITS = re.compile(r"^(logits?|outputs?|preds?|predictions?|scores|log_?probs?|y_?(pred|hat))$")
TARGETS = re.compile(r"^(targets?|labels?|y|y_?true|gold|tgt)$")
MASK = re.compile(r"mask|weights?$|keep")


def loss_in(scope: Mapping[str, Any], module: str) -> str | None:
    """The name of the one function that reads as a loss of logits and targets; of several, the one with a mask."""
    found = [name for name, value in scope.items() if _is_loss(name, value, module)]
    masked = [name for name in found if MASK.search(" ".join(_parameters(scope[name])[2:]))]
    best = masked or found
    return best[0] if len(best) == 1 else None


def _is_loss(name: str, value: Any, module: str) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module:
        return False
    first = [parameter.lower() for parameter in _parameters(value)[:2]]
    named = LOSS.search(name) is not None and ANOTHERS.search(name.lower()) is None
    return named and len(first) == 2 and LOGITS.match(first[0]) is not None and TARGETS.match(first[1]) is not None


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
