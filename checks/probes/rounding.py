"""A naive evaluation at a lower precision: every operation exact, and what it gives for activations rounded.

This is the error that a type cannot avoid, and so the unit in which a model's own error is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..expect import Where
from ..watch.location import line_now

# Where these decide which expert a token goes to, one rounding sends it elsewhere and moves its logits by any amount.
ROUTING = ("topk", "sort", "argsort", "argmax", "max", "multinomial")
NARROWER = {torch.float64: 3, torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}


class Rounded(TorchFunctionMode):
    """Inside, what depends on weights is rounded to `dtype` after every operation; constants stay exact."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.whole, self.routes = dtype, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ROUTING and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.routes = True
        in_place_or_property = name.endswith("_")
        if self.whole or in_place_or_property or _shift(name, args):
            return out
        return self.round(out)

    def round(self, out: Any) -> Any:
        if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad:
            return out.to(self.dtype).to(out.dtype)
        return out


def _shift(name: str, args: tuple) -> bool:
    """A number added or taken away: what a large one costs is the model's own choice."""
    return name in ("add", "sub", "rsub", "__add__", "__sub__", "__radd__", "__rsub__") and not all(
        isinstance(a, Tensor) for a in args[:2]
    )


class Promoted(TorchFunctionMode):
    """Inside, whoever asks for a floating-point type by name gets `dtype`: the exact evaluation rounds nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16") and args and isinstance(args[0], Tensor):
            return args[0].to(self.dtype)
        return func(*map(self.wide, args), **{name: self.wide(value) for name, value in (kwargs or {}).items()})

    def wide(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in NARROWER else value


@contextmanager
def naively(model: nn.Module, dtype: torch.dtype) -> Iterator[Rounded]:
    """A naive evaluation of the model. Norms and activations count as one operation: how they sum is their affair."""
    mode = Rounded(dtype)
    wrapped = [module for module in model.modules() if _one_operation(module)]
    before = [module.__dict__.get("forward") for module in wrapped]
    for module in wrapped:
        module.__dict__["forward"] = _as_one(module.forward, mode)
    try:
        with mode:
            yield mode
    finally:
        for module, forward in zip(wrapped, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _one_operation(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and all(p.dim() < 2 for p in module.parameters())


def _as_one(forward: Callable, mode: Rounded) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if sum(isinstance(value, Tensor) for value in (*args, *kwargs.values())) != 1:
            return forward(*args, **kwargs)
        mode.whole += 1
        try:
            out = forward(*args, **kwargs)
        finally:
            mode.whole -= 1
        return out if mode.whole else mode.round(out)

    return wrapped


@dataclass
class Cast:
    """A tensor that the forward itself turned into a narrower type; `activation` if it depends on weights."""

    to: torch.dtype
    activation: bool
    line: Where | None


class Casts(TorchFunctionMode):
    """Sees what the forward casts to a narrower floating-point type, and whether it runs under its own autocast."""

    CASTS = ("to", "half", "bfloat16", "type", "type_as")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Cast] = []
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.autocast = self.autocast or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        out = func(*args, **(kwargs or {}))
        cast = getattr(func, "__name__", "") in self.CASTS and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        if cast and NARROWER.get(out.dtype, 9) < NARROWER.get(args[0].dtype, 0):
            self.seen.append(Cast(out.dtype, args[0].requires_grad, line_now()))
        return out
