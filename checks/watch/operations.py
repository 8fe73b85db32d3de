"""Which operation a call of one of PyTorch's functions is, in every spelling: one table, of which all watchers read.

A product of activations is seen as batched matrices whether it is written with `@`, `bmm`, `baddbmm` or `einsum`.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MATRICES = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum")  # by name
TIMES = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm}
ADDED = {torch.baddbmm, Tensor.baddbmm, torch.addmm, Tensor.addmm}  # to their first argument
RATIOS = frozenset({"div", "div_", "true_divide", "true_divide_", "__truediv__", "__itruediv__"})  # by name
ONE = 1e-5  # by how much the sums of weights in float32 may miss one
ATTENTION = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False: None
)


@dataclass(frozen=True)
class Product:
    """Batched matrices [..., M, K] and [..., K, N] that are multiplied; how their axes were moved, if they were."""

    left: Tensor
    right: Tensor
    orders: tuple[list[int] | None, list[int] | None] = (None, None)


def product(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The two matrices that a call multiplies, whatever it adds to the result; None for any other call."""
    if func is torch.einsum:
        return _einsum(args)
    if func not in TIMES and func not in ADDED:
        return None
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)][func in ADDED :][:2]
    if len(given) < 2 or min(a.dim() for a in given) < 2:
        return None
    return Product(given[0], given[1])


def _einsum(args: tuple[Any, ...]) -> Product | None:
    """`bhts,bhsd->bhtd` and its like: one index summed over, one of each operand kept, the others those of a batch."""
    equation = args[0] if args else None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    inputs, _, output = _without_dots(equation.replace(" ", ""), operands).partition("->")
    one, _, other = inputs.partition(",")
    if any(len(set(letters)) < len(letters) for letters in (one, other, output)):
        return None
    batch = [letter for letter in one if letter in other and letter in output]
    summed = [letter for letter in one if letter in other and letter not in output]
    kept = [[letter for letter in letters if letter in output and letter not in batch] for letters in (one, other)]
    if [len(summed), *map(len, kept)] != [1, 1, 1] or len(one) + len(other) != 2 * len(batch) + 4:
        return None
    orders = (
        [one.index(letter) for letter in (*batch, *kept[0], *summed)],
        [other.index(letter) for letter in (*batch, *summed, *kept[1])],
    )
    left, right = (operand.permute(order) for operand, order in zip(operands, orders, strict=True))
    return Product(left, right, orders)


def _without_dots(equation: str, operands: Sequence[Tensor]) -> str:
    """The equation with letters of its own for the axes of `...`, the last of which all operands share."""
    inputs, arrow, output = equation.partition("->")
    counts = [x.dim() - len(each.replace("...", "")) for each, x in zip(inputs.split(","), operands, strict=False)]
    spare = [letter for letter in string.ascii_letters if letter not in equation][: max(counts, default=0)]
    each = ["".join(spare[len(spare) - count :]) if count > 0 else "" for count in counts]
    written = [labels.replace("...", dots) for labels, dots in zip(inputs.split(","), each, strict=False)]
    return ",".join(written) + arrow + output.replace("...", "".join(spare))


@dataclass(frozen=True)
class Attention:
    """The arguments of fused attention: query [..., T, D], key and value [..., S, D], what may be seen."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float | None = None  # None: 1/√D

    @property
    def factor(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else float(self.scale)


def fused_attention(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Attention | None:
    """What is given to PyTorch's fused attention, by place or by name; None for any other call."""
    if func is not F.scaled_dot_product_attention:
        return None
    try:
        given = ATTENTION.bind(*args, **kwargs)
    except TypeError:  # which the call raises as well
        return None
    given.apply_defaults()
    found = given.arguments
    return Attention(
        found["query"], found["key"], found["value"], found["attn_mask"], bool(found["is_causal"]), found["scale"]
    )


def softmax_axis(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The axis of a softmax, counted from the end; None for any other call."""
    if getattr(func, "__name__", "") != "softmax":
        return None
    x = args[0] if args else kwargs.get("input")
    axis = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if not isinstance(x, Tensor) or not isinstance(axis, int) or not x.dim():
        return None
    return axis % x.dim() - x.dim()


def softmax_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What the softmax is taken of."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def weights_axis(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """The axis along which a call makes weights [.., .., ..], counted from the end; None for any other call.

    It is a softmax, or a division after which the numbers sum to one: a softmax written by hand.
    """
    if not isinstance(result, Tensor) or result.dim() < 3 or not result.is_floating_point():
        return None
    if (axis := softmax_axis(func, args, kwargs)) is not None:
        return axis
    if getattr(func, "__name__", "") not in RATIOS or not result.numel() or bool((result < 0).any()):
        return None
    sums = (axis for axis in (-1, -2) if result.shape[axis] > 1 and bool(((result.sum(axis) - 1).abs() <= ONE).all()))
    return next(sums, None)
