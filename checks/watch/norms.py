"""Norms among a model's modules, known by name and by what they map, and called alone on inputs of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, recorded, tensors

NAMED = re.compile(r"norm(?!al(?!i))|rms|(?<![a-z])ln(?![a-z])", re.IGNORECASE)  # but neither Normal nor NormalInit
STAND_IN = re.compile(r"identity|affine|dropout|no_?op|skip|fake|^no_?norm", re.IGNORECASE)  # where a norm is off
STATISTICS = re.compile(r"running|moving|num_batches|ema", re.IGNORECASE)
TORCHS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # of PyTorch's own norms; batch and instance norms do something else
LARGE = 30.0  # of an input, against which no usual epsilon counts; its square fits into half precision
MANY = 64  # norms to look at


@dataclass
class Norm:
    """One norm, with the first input that the model gave it; called, it gives what it makes of another."""

    name: str
    module: nn.Module
    seen: Tensor  # [..., C]
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.args:
                return self.module(x, *self.args[1:], **self.kwargs).double()
            return self.module(**{key: x if isinstance(v, Tensor) else v for key, v in self.kwargs.items()}).double()

    def odd(self, x: Tensor) -> Tensor:
        """Without what it adds whatever the input: (f(x) - f(-x)) / 2."""
        return (self(x) - self(-x)) / 2

    def random(self, seed: int, like: Tensor | None = None) -> Tensor:
        """Normal numbers of the shape and type of what it was given."""
        like = self.seen if like is None else like
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Its parameters of one number a feature."""
        return {n: p for n, p in self.module.named_parameters() if p.numel() == self.seen.shape[-1] > 1}

    @property
    def named_norm(self) -> bool:
        """Whether its class, and not only the attribute that holds it, says that it is a norm."""
        return bool(NAMED.search(type(self.module).__name__))

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """With other values in some of its parameters."""
        parameters = dict(self.module.named_parameters())
        before = {name: parameters[name].detach().clone() for name in values}
        try:
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    def shaken(self) -> Any:
        """With gains and biases that are neither zero nor all alike."""
        generator = torch.Generator().manual_seed(5)

        def beside(p: Tensor) -> Tensor:
            return p.detach() + 0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p)

        return self.holding({name: beside(p) for name, p in self.vectors.items()})


def norms(model: nn.Module, run: Any) -> list[Norm]:
    """The norms that run, in order of their first calls."""
    with recorded(model) as calls:
        run()
    modules = dict(model.named_modules())
    found = [_norm(modules[call.module], call) for call in calls if call.nth == 0 and call.module in modules]
    return [norm for norm in found if norm is not None][:MANY]


def _norm(module: nn.Module, call: Call) -> Norm | None:
    last = call.module.rpartition(".")[2]
    kind = type(module).__name__
    if not (NAMED.search(kind) or NAMED.search(last)) or STAND_IN.search(kind) or "parametrizations" in call.module:
        return None
    if type(module).__module__.startswith("torch.") and not isinstance(module, TORCHS):
        return None
    given, result = tensors((call.args, call.kwargs)), call.result
    if len(given) != 1 or not isinstance(result, Tensor) or result.shape != given[0].shape or given[0].dim() < 2:
        return None
    if call.args and not isinstance(call.args[0], Tensor):
        return None
    C = given[0].shape[-1]
    sizes = [(p.numel(), max(p.shape, default=1)) for p in module.parameters()]
    if C < 2 or any(n not in (1, C) or widest != n for n, widest in sizes) or not (sizes or NAMED.search(kind)):
        return None
    if any(STATISTICS.search(name) for name, _ in module.named_buffers()):  # a batch norm's
        return None
    return Norm(call.module, module, given[0], call.args, call.kwargs)
