"""Custom activations: modules and functions named after a known activation, and what they should compute."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..expect import Where, shown
from .location import TORCH, locate

BEFORE = "new|fast|quick|accurate|approximate|approx|tanh|exact|my|custom|py|torch|bert|openai|gpt2?"
BEHIND = "tanh|new|fast|exact|approximation|approximate|approx|activation|function|python|layer"
KNOWN = re.compile(rf"(?:(?:{BEFORE})_?)*(gelu|silu|swish|relu)(?:_?(?:{BEHIND}))*", re.IGNORECASE)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "gelu": (F.gelu, partial(F.gelu, approximate="tanh"), quick_gelu),
    "silu": (F.silu,),
    "swish": (F.silu,),
    "relu": (F.relu,),
}


@dataclass(frozen=True)
class Activation:
    """A module or function named after a known activation."""

    apply: Callable[[Tensor], Any]
    kind: str  # gelu, silu, swish or relu
    named: str  # as in "act is called NewGELU"
    where: Where

    def __call__(self, x: Tensor) -> Tensor | None:
        """Its values at the numbers x [N], which it is given as [1, 1, N]; None if it refuses such a tensor."""
        try:
            with torch.no_grad():
                result = self.apply(x[None, None])
        except Exception:  # foreign code may raise anything for an unexpected input
            return None
        return result.flatten().double() if isinstance(result, Tensor) and result.numel() == x.numel() else None


def activations(model: nn.Module, run: Callable[[], Any]) -> list[Activation]:
    """The custom ones: modules without parameters, and functions of one argument that run."""
    found = []
    for name, module in model.named_modules():
        kind = _kind(type(module).__name__)
        if kind and not type(module).__module__.startswith("torch.") and not any(True for _ in module.parameters()):
            found.append(Activation(module, kind, f"{name} is called {type(module).__name__}", locate(model, name)))
    for function in _called(run):
        kind, code = _kind(function.__name__), function.__code__
        if kind and code.co_argcount == 1 and not code.co_kwonlyargcount:
            place = Where(function.__name__, "function", shown(code.co_filename), code.co_firstlineno)
            found.append(Activation(function, kind, f"the function is called {function.__name__}", place))
    return found


def _kind(name: str) -> str | None:
    known = KNOWN.fullmatch(name)
    return known[1].lower() if known else None


def _called(run: Callable[[], Any]) -> list[Any]:
    """The module-level functions that run, except PyTorch's."""
    found: dict[int, Any] = {}

    def note(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        function = frame.f_globals.get(code.co_name) if event == "call" else None
        same = getattr(function, "__code__", None) is code
        if same and not code.co_filename.startswith(TORCH):
            found[id(function)] = function

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return list(found.values())
