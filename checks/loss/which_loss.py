"""Which function of a student's file is its loss, where none is called `loss`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from .met_loss import role_of

LOSS = re.compile(r"(^|_)(loss|nll|cross_?entropy)(_|$)", re.IGNORECASE)
ANOTHERS = re.compile(
    r"plot|log|print|eval|estim|train|valid|test|record|save|aux|balanc|distil|contrast|triplet|reward"
)


def loss_in(scope: Mapping[str, Any], module: str) -> str | None:
    """The name of the one function that reads as a loss of logits and targets; of several, the one with a mask."""
    found = [name for name, value in scope.items() if _is_loss(name, value, module)]
    masked = [name for name in found if "mask" in _roles(scope[name])]
    best = masked or found
    return best[0] if len(best) == 1 else None


def _is_loss(name: str, value: Any, module: str) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module:
        return False
    named = LOSS.search(name) is not None and ANOTHERS.search(name.lower()) is None
    return named and _roles(value)[:2] == ["logits", "targets"]


def _roles(function: Any) -> list[str]:
    roles: list[str] = []
    for parameter in inspect.signature(function).parameters:
        roles.append(role_of(parameter.lower(), roles))
    return roles
