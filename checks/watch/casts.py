"""Casts in a forward: tensors that the model's own code converts to a narrower floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..expect import Where
from .location import line_now

DIGITS = {torch.float64: 3, torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}  # more is finer
CASTS = ("to", "half", "bfloat16", "type", "type_as")


@dataclass(frozen=True)
class Cast:
    """One tensor cast to a narrower type; `activation` if it depends on weights."""

    to: torch.dtype
    activation: bool
    line: Where | None


class Casts(TorchFunctionMode):
    """Records casts to a narrower floating-point type, and whether the forward turns on autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Cast] = []
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.autocast = self.autocast or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        out = func(*args, **(kwargs or {}))
        cast = getattr(func, "__name__", "") in CASTS and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        if cast and DIGITS.get(out.dtype, 9) < DIGITS.get(args[0].dtype, 0):
            self.seen.append(Cast(out.dtype, args[0].requires_grad, line_now()))
        return out
