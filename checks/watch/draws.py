"""Who draws random numbers: the global generators seeded and restored, their states read, and dropout sites alone.

A dropout site is judged by itself: only its module in training mode, everything else in evaluation mode.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..expect import Where
from .calls import line_now

RATE_NAME = re.compile(r"^p$|drop(out)?(_?(p|prob|rate|ratio|probability))?$|^p_?drop(out)?$|pdrop$", re.I)
NOT_A_SITE = re.compile(r"layer_?drop|drop_?(path|layer|token)|stochastic|head_?drop", re.I)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of PyTorch, Python and NumPy seeded inside, and afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Inside, what `torch.empty` gives is NaN, and not whatever lay there."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def states() -> dict[str, bytes]:
    """The state of every global generator, by the name of its library, to be compared."""
    numpy: Any = np.random.get_state()
    found = {
        "PyTorch": torch.get_rng_state().numpy().tobytes(),
        "Python": repr(random.getstate()).encode(),
        "NumPy": numpy[1].tobytes() + str(numpy[2:]).encode(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["CUDA"] = torch.cuda.get_rng_state().cpu().numpy().tobytes()
    return found


@dataclass(frozen=True)
class Site:
    """A module that declares a dropout rate, under the name of the attribute that holds it."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        return float(getattr(self.module, self.attribute))

    @property
    def functional(self) -> bool:
        """Whether the module holds a rate for a dropout that it applies itself, among other things."""
        return not is_dropout(self.module)


def sites(model: nn.Module) -> list[Site]:
    """Dropout modules with a rate above 0, and modules that hold such a rate and contain none that does."""
    found = [
        Site(name, module, _rates(module)[0])
        for name, module in model.named_modules()
        if _rates(module) and not any(_rates(inner) for inner in module.modules() if inner is not module)
    ]
    return [site for site in found if 0 < site.rate < 1]


def is_dropout(module: nn.Module) -> bool:
    """PyTorch's dropouts, and people's own: a module without children whose class says so."""
    own = "dropout" in type(module).__name__.lower() and not any(module.children())
    return isinstance(module, _DropoutNd) or (own and bool(_rates(module)))


def holds_rate(module: nn.Module) -> bool:
    """Whether the module itself, not a part of it, has a dropout rate among its attributes."""
    return bool(_rates(module))


def _rates(module: nn.Module) -> list[str]:
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and RATE_NAME.search(name) and not NOT_A_SITE.search(name)
    ]


def set_rates(model: nn.Module, rate: float) -> None:
    """Gives every declared site, also one of rate 0, this rate."""
    for module in model.modules():
        for attribute in _rates(module):
            setattr(module, attribute, rate)


@contextmanager
def training_alone(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Only these modules, not even their children, in training mode."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def reads_mode(module: nn.Module) -> bool:
    """Whether the mode can matter to a module: code of its class reads `training`, and no rate of 0 silences it."""
    if isinstance(module, _DropoutNd) and module.p == 0:
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    codes = [getattr(value, "__code__", None) for kind in classes for value in vars(kind).values()]
    return any(code is not None and "training" in code.co_names for code in codes)


class Draws(TorchFunctionMode):
    """Sees what is drawn inside: dropouts with their rate, and random tensors with their shape."""

    RANDOM = ("rand", "bernoulli", "normal", "uniform", "exponential", "multinomial")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dropped: list[str] = []
        self.shapes: list[torch.Size] = []  # of masks drawn by hand
        self.line: Where | None = None  # of the first dropout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        if rate := _rate_in_force(name, args, kwargs):
            self.line = self.line or line_now()
            self.dropped.append(f"{name} with a rate of {rate:g}")
        elif any(word in name for word in self.RANDOM) and isinstance(result, torch.Tensor):
            self.names.append(name)
            self.shapes.append(result.shape)
        return result

    def shared(self, owner: nn.Module) -> bool:
        """Whether masks were drawn by hand that are no masks of the owner's weights: one for all rows."""
        weights = {parameter.shape for parameter in owner.parameters()}
        masks = [shape for shape in self.shapes if len(shape) > 1]  # a single number skips a whole layer
        return bool(masks) and not any(shape in weights for shape in masks)


def _rate_in_force(name: str, args: tuple, kwargs: dict[str, Any]) -> float:
    """The rate of a call of F.dropout or scaled_dot_product_attention; 0 for one that drops nothing."""
    if name == "scaled_dot_product_attention":
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if name == "dropout":
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if training else 0.0
    return 0.0
