"""Norms among a model's modules, recognized by name and shapes, and measured alone on chosen inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, recorded, tensors

NAMED = re.compile(r"norm(?!al(?!i))|rms|(?<![a-z])ln(?![a-z])", re.IGNORECASE)  # matches neither Normal nor NormalInit
STAND_IN = re.compile(r"identity|affine|dropout|no_?op|skip|fake|^no_?norm", re.IGNORECASE)  # replaces a norm
STATISTICS = re.compile(r"running|moving|num_batches|ema", re.IGNORECASE)
TORCHS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # PyTorch's norms, except batch and instance norms
LARGE = 30.0  # size of an input so large that no usual epsilon matters; its square fits into half precision
LINEAR = 1e-5  # of the largest output: distance from linear that float32 allows
MANY = 64  # norms to look at


@dataclass
class Norm:
    """One norm, and the arguments of its first call. Calling it applies the norm to another input."""

    name: str
    module: nn.Module
    seen: Tensor  # [..., C]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.args:
                out: Tensor = self.module(x, *self.args[1:], **self.kwargs)
            else:
                out = self.module(**{key: x if isinstance(v, Tensor) else v for key, v in self.kwargs.items()})
            return out.double()

    def odd(self, x: Tensor) -> Tensor:
        """The odd part (f(x) - f(-x)) / 2, which has no bias."""
        return (self(x) - self(-x)) / 2

    def random(self, seed: int, like: Tensor | None = None) -> Tensor:
        """Normally distributed numbers in the shape and type of its input."""
        like = self.seen if like is None else like
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Its parameters with one number per feature."""
        return {n: p for n, p in self.module.named_parameters() if p.numel() == self.seen.shape[-1] > 1}

    @property
    def named_norm(self) -> bool:
        """Whether its class is named after a norm, and not only the attribute that holds it."""
        return bool(NAMED.search(type(self.module).__name__))

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Inside, some of its parameters have other values."""
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

    def shaken(self) -> AbstractContextManager[None]:
        """Inside, its gains and biases are random, and none is zero."""
        generator = torch.Generator().manual_seed(5)

        def beside(p: Tensor) -> Tensor:
            return p.detach() + 0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p)

        return self.holding({name: beside(p) for name, p in self.vectors.items()})

    @property
    def featurewise(self) -> bool:
        """Whether every output feature depends on the same input feature alone: then it is no norm."""
        x = self.random(3)
        changed = x.clone()
        changed[..., 0] += 3.0
        return torch.equal(self(x)[..., 1:], self(changed)[..., 1:])

    @property
    def ignores_its_vectors(self) -> bool:
        x = self.random(3)
        before = self(x)
        with self.holding({name: p.detach() + 1 for name, p in self.vectors.items()}):
            return torch.equal(before, self(x))

    @property
    def constant(self) -> bool:
        """Whether its output is the same for different inputs."""
        return torch.equal(self(self.random(1)), self(self.random(2)))

    def mean_taken(self) -> float | None:
        """How much of the mean it subtracts: 1 for a layer norm, 0 for an RMS norm, None if it is neither."""
        ones = {name: torch.ones_like(p) for name, p in self.vectors.items()}
        with self.holding(ones):
            x = (self.random(4) + 0.7) * LARGE
            out = self.odd(x).flatten(0, -2)
        x = x.double().flatten(0, -2)
        mean = x.mean(-1, keepdim=True).expand_as(x)
        fitted = torch.linalg.lstsq(torch.stack((x, mean), dim=-1), out[..., None])
        factors = fitted.solution[..., 0]  # [N, 2]
        rest = out - (factors[:, :1] * x + factors[:, 1:] * mean)
        if not float(rest.abs().max()) <= LINEAR * float(out.abs().max()):
            return None
        return float((-factors[:, 1] / factors[:, 0]).median())

    def share_of_full(self, x: Tensor) -> float:
        """The size of its output relative to its output for the same input made large; the median over tokens."""
        size = x.double().square().mean(-1, keepdim=True).sqrt()
        large = (x / size.clamp(min=1e-30).to(x)) * LARGE
        sizes = [self.odd(each).square().mean(-1).sqrt() for each in (x, large)]
        return float((sizes[0] / sizes[1]).nanmedian())

    def effect(self, name: str) -> str:
        """What one of its vectors does to its output: "multiplies", "adds", or "nothing"."""
        x, other = self.random(1), self.random(2)
        with self.shaken():
            before = self(x), self(other)
            with self.holding({name: self.vectors[name].detach() + 1}):
                moves = self(x) - before[0], self(other) - before[1]
        size = float(before[0].abs().max())
        if not float(moves[0].abs().max()) > LINEAR * size:
            return "nothing"
        return "adds" if float((moves[0] - moves[1]).abs().max()) <= LINEAR * size else "multiplies"

    def size_beside_gain(self) -> float | None:
        """The size of its output for a large input; None unless its gains are all ones."""
        gains = [p for name, p in self.vectors.items() if self.effect(name) == "multiplies"]
        if len(gains) > 1 or any(bool((p != 1).any()) for p in gains):
            return None
        return float(self.odd(self.random(6) * LARGE).square().mean(-1).sqrt().median())


def norms(model: nn.Module, run: Callable[[], object]) -> list[Norm]:
    """The norms that `run` calls, in the order of their first calls."""
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
    if any(STATISTICS.search(name) for name, _ in module.named_buffers()):  # a batch norm
        return None
    return Norm(call.module, module, given[0], call.args, call.kwargs)
