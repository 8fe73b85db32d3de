"""Activations of a model's own, known by their class's name, and the numbers that such a name promises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def kind_of(module: nn.Module) -> str | None:
    """gelu, silu, swish or relu, where its class says nothing else and it has nothing to learn."""
    known = KNOWN.fullmatch(type(module).__name__)
    torchs = type(module).__module__.startswith("torch.")
    return None if torchs or known is None or any(True for _ in module.parameters()) else known[1].lower()


def activations(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, kind) of each."""
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            yield name, module, kind


def activated(module: nn.Module, x: Tensor) -> Tensor | None:
    """What it makes of numbers [N], given as [1, 1, N]; None where it takes no such tensor."""
    try:
        with torch.no_grad():
            result = module(x[None, None])
    except Exception:  # whatever a foreign module raises for what it does not expect
        return None
    return result.flatten().double() if isinstance(result, Tensor) and result.numel() == x.numel() else None
