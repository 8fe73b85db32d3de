"""Two evaluations to compare a model with: one that never narrows its types, and a naive one at lower precision.

The naive one computes every operation exactly and rounds its result. That error cannot be avoided in the lower type,
so a model's own error is measured in multiples of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..watch.casts import DIGITS

# Where one of these picks a token's expert, a single rounding may pick another one and change the logits by any amount.
ROUTING = ("topk", "sort", "argsort", "argmax", "max", "multinomial")


class Rounded(TorchFunctionMode):
    """Rounds the result of every operation to `dtype` if it depends on weights; constants stay exact."""

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


def _shift(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a plain number is added or subtracted: the rounding that a large one causes is the model's own choice."""
    return name in ("add", "sub", "rsub", "__add__", "__sub__", "__radd__", "__rsub__") and not all(
        isinstance(a, Tensor) for a in args[:2]
    )


class Promoted(TorchFunctionMode):
    """Replaces every floating-point type that the model asks for by `dtype`, so that nothing is rounded on the way."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("float", "half", "bfloat16") and args and isinstance(args[0], Tensor):
            return args[0].to(self.dtype)
        return func(*map(self.replaced, args), **{name: self.replaced(value) for name, value in (kwargs or {}).items()})

    def replaced(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value in DIGITS:
            return self.dtype
        return self.dtype.to_complex() if value is torch.complex64 else value


@contextmanager
def in_float64() -> Iterator[None]:
    """Everything in float64: types that the model asks for, and the default type of new tensors.

    Llama and its relatives compute norms and angles with `.float()` and would otherwise agree only to 1e-7. This hides
    mistakes of precision, which are judged without it.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promoted(torch.float64):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def naively(model: nn.Module, dtype: torch.dtype) -> Iterator[Rounded]:
    """Evaluates the model naively. A norm or activation counts as one operation: how it sums inside is not judged."""
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


def _as_one(forward: Callable[..., Any], mode: Rounded) -> Callable[..., Any]:
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
