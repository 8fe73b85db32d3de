"""Where the logits [B, T, V] are in what a forward returns, and in which layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from .stubs import Stub

# Where objects and dictionaries keep their logits, the surest first.
LOGITS_KEYS = ("logits", "lm_logits", "prediction_logits", "prediction_scores", "scores", "output", "outputs", "out")

Arrange = Callable[[Tensor, int, int], Tensor]  # what came back, B, T -> [B, T, V]


class Unreadable(ValueError):
    """The output has no logits for every position; `last_only`: it has them for the last one."""

    def __init__(self, says: str, *, last_only: bool = False, short: bool = False, hidden: bool = False) -> None:
        super().__init__(says)
        self.last_only, self.short, self.hidden = last_only, short, hidden


@dataclass(frozen=True)
class Layout:
    """The order of the axes of the tensor that came back."""

    says: str
    arrange: Arrange

    def fits(self, x: Tensor, B: int, T: int) -> bool:
        """Whether a tensor can be logits for B × T tokens, in this layout or flat."""
        shape = tuple(x.shape)
        if self.says == "[B, V, T]":
            return len(shape) == 3 and (shape[0], shape[2]) == (B, T)
        places = (T, B) if self.says == "[T, B, V]" else (B, T)
        return len(shape) in (2, 3) and shape[:-1] in (places, (B * T,))


def _unflattened(x: Tensor, B: int, T: int) -> Tensor:
    return x.reshape(B, T, x.shape[-1])


PLAIN = Layout("[B, T, V]", _unflattened)
FLAT = Layout("[B·T, V]", _unflattened)
TIME_FIRST = Layout("[T, B, V]", lambda x, B, T: x.reshape(T, B, x.shape[-1]).transpose(0, 1))
CLASSES_FIRST = Layout("[B, V, T]", lambda x, B, T: x.transpose(1, 2))
ONE_ROW = Layout("[T, V]", _unflattened)


def tensors_in(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that could be the logits, and where it is, the most likely first."""
    if isinstance(output, Stub):
        output._refuse()
    if isinstance(output, Tensor):
        yield "", output
    elif isinstance(output, numpy.ndarray | list) and not _holds_tensors(output):
        try:
            yield "", torch.as_tensor(numpy.asarray(output))
        except (TypeError, ValueError):
            return
    elif isinstance(output, Mapping):
        for key in [k for k in LOGITS_KEYS if k in output] or list(output):
            yield from ((f'["{key}"]{path}', x) for path, x in tensors_in(output[key]))
    elif isinstance(output, tuple | list):
        for index, item in enumerate(output):
            yield from ((f"[{index}]{path}", x) for path, x in tensors_in(item))
    elif output is not None:
        for key in LOGITS_KEYS:
            if isinstance(getattr(output, key, None), Tensor | numpy.ndarray):
                yield from ((f".{key}{path}", x) for path, x in tensors_in(getattr(output, key)))
                return
        data = getattr(output, "data", None)  # a tensor class of their own, over NumPy
        if isinstance(data, numpy.ndarray):
            yield ".data", torch.as_tensor(data)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list) and any(not isinstance(item, int | float | list) for item in value)


def recognise(output: Any, B: int, T: int, V: int | None) -> tuple[Layout, Tensor]:
    """The layout and the tensor of the logits in the output for tokens [B, T]. Raises Unreadable."""
    found = list(tensors_in(output))
    for _, tensor in found:
        layout = _layout(tensor, B, T, V)
        if layout is not None and not tensor.is_floating_point():
            raise Unreadable(f"logits are {tensor.dtype}, expected floating-point numbers: {described(output)}")
        if layout is not None:
            return layout, tensor
    raise _unreadable(output, found, B, T, V)


def pick(output: Any, layout: Layout, B: int, T: int) -> Tensor:
    """The logits [B, T, V] in an output whose layout is known, for any vocabulary size."""
    found = list(tensors_in(output))
    for _, tensor in found:
        if layout.fits(tensor, B, T):
            return layout.arrange(tensor, B, T)
    raise _unreadable(output, found, B, T, None)


def _layout(x: Tensor, B: int, T: int, V: int | None) -> Layout | None:
    shape, last = tuple(x.shape), V if V is not None else (x.shape[-1] if x.dim() else 0)
    if V is None and last in (0, 1):
        return None
    if shape == (B, T, last):
        return PLAIN
    if shape == (T, B, last):
        return TIME_FIRST
    if shape == (B * T, last):
        return FLAT
    if V is not None and shape == (B, V, T):
        return CLASSES_FIRST
    return ONE_ROW if B == 1 and shape == (T, last) else None


def _unreadable(output: Any, found: list[tuple[str, Tensor]], B: int, T: int, V: int | None) -> Unreadable:
    shapes = [tuple(x.shape) for _, x in found]
    wanted = f"expected logits [{B}, {T}, {V if V is not None else 'V'}]"
    says = f"{wanted}, got {described(output)}"
    if any(_one_position(shape, B, V) for shape in shapes):
        return Unreadable(f"{says}: the last position only", last_only=True)
    if any(s[:-1] in ((B, T - 1), (B * (T - 1),)) and (len(s) == 3 or s[-1] == V) for s in shapes):
        return Unreadable(f"{says}: one position short", short=True)
    if any(len(s) == 3 and s[:2] == (B, T) for s in shapes):
        return Unreadable(says, hidden=True)
    return Unreadable(says)


def _one_position(shape: tuple[int, ...], B: int, V: int | None) -> bool:
    return len(shape) in (2, 3) and V in (None, shape[-1]) and shape[:-1] in ((B, 1), (B,), (1, B))


def described(output: Any, known: Mapping[int, str] | None = None) -> str:
    """A value by its types and shapes, `(Tensor [3, 1, 17], None)`; ids in `known`, and losses, by name."""
    known = known or {}
    if id(output) in known:
        return known[id(output)]
    if isinstance(output, Tensor | numpy.ndarray):
        loss = known and output.ndim == 0
        return "loss" if loss else f"{type(output).__name__} {list(output.shape)}"
    if isinstance(output, tuple | list):
        inner = ", ".join(described(item, known) for item in list(output)[:4]) + ", …" * (len(output) > 4)
        return f"({inner})" if isinstance(output, tuple) else f"[{inner}]"
    if output is None or isinstance(output, int | float | bool | str):
        return repr(output)
    found = output if isinstance(output, Mapping) else {k: getattr(output, k, None) for k in LOGITS_KEYS}
    named = ", ".join(f".{k} {described(v, known)}" for k, v in list(found.items())[:4] if v is not None)
    return f"{type(output).__name__} with {named}" if named else type(output).__name__


SUMMED = 1e-3  # how far the sum of probabilities may be from one, in any dtype


def standing_for(logits: Tensor) -> str:
    """What a model returns as logits [B, T, V]: "logits", "log-probabilities" or "probabilities"."""
    x = logits.double()
    if float(x.logsumexp(-1).abs().max()) < SUMMED:
        return "log-probabilities"
    return "probabilities" if bool((x >= 0).all()) and float((x.sum(-1) - 1).abs().max()) < SUMMED else "logits"
