"""Activation checkpointing: how it is turned on in a model that has a switch for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

CHECKPOINTING = re.compile(r"^(use_|enable_)?(gradient_|activation_|grad_|act_)?(checkpoint(ing)?|recompute|ckpt)$")


def checkpointing(model: Any) -> Callable[[], None] | None:
    """A function that turns on activation checkpointing, by the library's method or by every flag of that name."""
    if callable(getattr(model, "gradient_checkpointing_enable", None)):
        if not getattr(model, "supports_gradient_checkpointing", True):
            return None
        return partial(model.gradient_checkpointing_enable)
    holders = [vars(module) for module in model.modules()]
    holders += [vars(h["config"]) for h in holders if hasattr(h.get("config"), "__dict__")]
    flags = [(h, key) for h in holders for key, value in h.items() if value is False and CHECKPOINTING.match(key)]

    def turn_on() -> None:
        for holder, key in flags:
            holder[key] = True

    return turn_on if flags else None
