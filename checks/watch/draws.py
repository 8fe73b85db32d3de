"""Random numbers: seeding the global generators, comparing their states, and recording what a forward draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..expect import Where
from ..subject import torch_seeded
from .location import line_now


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of PyTorch, Python and NumPy inside, and restores them afterwards."""
    python = random.getstate()
    with torch_seeded(seed), _another_numpy_generator():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)


_spare: list[np.random.MT19937] = []


@contextmanager
def _another_numpy_generator() -> Iterator[None]:
    """Puts another in the place of NumPy's global generator: to copy its state takes as long as a small forward."""
    numpy: Any = np.random
    own, other = numpy.get_bit_generator(), _spare.pop() if _spare else np.random.MT19937(0)
    numpy.set_bit_generator(other)
    try:
        yield
    finally:
        numpy.set_bit_generator(own)
        _spare.append(other)


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Inside, `torch.empty` returns NaN instead of whatever the memory held."""
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def states() -> dict[str, bytes]:
    """The state of every global generator, by the name of its library, in a form that can be compared."""
    numpy: Any = np.random.get_state()
    found = {
        "PyTorch": torch.get_rng_state().numpy().tobytes(),
        "Python": repr(random.getstate()).encode(),
        "NumPy": numpy[1].tobytes() + str(numpy[2:]).encode(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["CUDA"] = torch.cuda.get_rng_state().cpu().numpy().tobytes()
    return found


class Draws(TorchFunctionMode):
    """Records what is drawn inside: dropouts with their rate, and random tensors with their shape."""

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
        """Whether masks were drawn without F.dropout, apart from masks of the owner's weights, which all rows share."""
        weights = {parameter.shape for parameter in owner.parameters()}
        masks = [shape for shape in self.shapes if len(shape) > 1]  # a single number skips a layer
        return bool(masks) and not any(shape in weights for shape in masks)


def _rate_in_force(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The dropout rate of a call of F.dropout or scaled_dot_product_attention; 0 if it drops nothing."""
    if name == "scaled_dot_product_attention":
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if name == "dropout":
        training = kwargs.get("training", args[2] if len(args) > 2 else True)
        return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5)) if training else 0.0
    return 0.0
