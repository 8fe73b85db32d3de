"""Matrix products as PyTorch's functions see them: with weight matrices, and with attention weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..expect import Where
from .location import line_now
from .operations import ADDED, TIMES, Product, fused_attention, product, weights_axis

MIXING = {F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.cumsum, Tensor.cumsum}
CONVOLUTIONS = {torch.conv1d, F.conv1d}
EXACT = 1e-6  # relative: the residual allowed after fitting a factor and a constant, for float32


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


@dataclass(frozen=True)
class Mapped:
    """One product with a weight matrix: rows [N, F] in, rows [N, G] out, and the line that calls it.

    Both tensors are part of the autograd graph. `matrix` identifies the weights across calls.
    """

    rows: Tensor
    gives: Tensor
    where: Where | None
    matrix: int


class WeightProducts(TorchFunctionMode):
    """Records every product with a weight matrix. The model gets copies, since it may change them in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = names_of(model)
        self.found: list[Mapped] = []
        self.mixed: list[int] = []  # the length of `found` each time that tokens were mixed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if mixes(func, args):
            self.mixed.append(len(self.found))
        known = multiplied(func, args)
        rows = None if known is None else _flat(known[0].movedim(known[2], -1).clone())
        result = func(*args, **(kwargs or {}))
        if known is None or rows is None or not (isinstance(result, Tensor) and result.numel()):
            return result
        moved = result.movedim(known[2], -1)
        gives = moved.reshape(-1, moved.shape[-1])
        if not gives.requires_grad and torch.is_grad_enabled():
            gives = gives.detach().requires_grad_()  # the matrix is frozen
        self.found.append(Mapped(rows, gives, line_now(self.names), known[1].data_ptr()))
        return gives.clone().view(moved.shape).movedim(-1, known[2])


def mixes(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the call may mix tokens: products of activations, cumulative sums, convolutions, attention."""
    given = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,)) if isinstance(a, Tensor)]
    if func in CONVOLUTIONS:
        return len(given) > 1 and given[1].shape[-1] > 1
    products = func in TIMES or func in ADDED or func is torch.einsum
    return func in MIXING or (products and sum(a.dim() > 2 for a in given) > 1)


def _flat(x: Tensor) -> Tensor | None:
    return x.reshape(-1, x.shape[-1]) if x.numel() and x.is_floating_point() else None


def multiplied(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, int] | None:
    """The input of a product with a weight matrix, the matrix, and the axis of the features; None for other calls."""
    given = [a for a in args if isinstance(a, Tensor)]
    if (func is F.linear and len(given) > 1) or (func in TIMES and len(given) > 1 and given[1].dim() == 2):
        return given[0], given[1], -1
    if func is torch.addmm and len(given) > 2:
        return given[1], given[2], -1
    if func in CONVOLUTIONS and len(given) > 1 and given[1].shape[-1] == 1 and given[1].shape[1] == given[0].shape[1]:
        return given[0], given[1], 1  # a kernel of size 1
    return None


def multiple(of: Tensor, x: Tensor) -> tuple[float, float] | None:
    """The numbers a and b with x = a · of + b; None if there are no such numbers."""
    if not of.numel():
        return None
    a, b = of.double(), x.double()
    da, db = a - a.mean(), b - b.mean()
    if not (bool(a.isfinite().all() and b.isfinite().all()) and float(da.abs().max()) > 0):
        return None
    factor = float((da * db).sum() / da.square().sum())
    apart = float((db - factor * da).abs().max())
    if factor == 0 or not apart <= EXACT * float(db.abs().max()):
        return None
    return factor, float(b.mean() - factor * a.mean())


@dataclass(frozen=True)
class Weighed:
    """Attention weights as they multiply the values: the axis of the keys, and the softmax that they come from."""

    weights: Tensor  # [..., T, S] or [..., S, T]
    axis: int  # of the keys
    along: int  # the axis of the softmax
    factor: float  # by which they were multiplied after the softmax
    where: Where | None

    @property
    def off(self) -> float:
        """The largest distance from one among the sums over each query's keys."""
        return float((self.weights.double().sum(self.axis) - 1).abs().max())


class Attended(TorchFunctionMode):
    """Records attention weights as they multiply the values, and the keys and values of every head, layer by layer."""

    def __init__(self, model: nn.Module, T: int) -> None:
        super().__init__()
        self.names, self.T = names_of(model), T
        self.softmaxes: list[tuple[int, Tensor]] = []
        self.weighed: list[Weighed] = []
        self.keys: list[Tensor] = []  # [..., H, S, D], since the last product with values
        self.pairs: list[tuple[Tensor, Tensor, Where | None]] = []  # keys and values of one attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (given := fused_attention(func, args, kwargs)) is not None:
            pair = given.key.detach().clone(), given.value.detach().clone()
            self.pairs.append((*pair, line_now(self.names)))
        elif (factors := product(func, args, kwargs)) is not None and factors.left.dim() > 2 < factors.right.dim():
            self.product(factors)
        result = func(*args, **kwargs)
        axis = weights_axis(func, args, kwargs, result)
        if axis is not None:
            self.softmaxes.append((axis, result.detach().clone()))
        return result

    def product(self, factors: Product) -> None:
        a, b = factors.left.detach(), factors.right.detach()
        if a.shape[-2] == self.T <= b.shape[-1] and a.shape[-1] == b.shape[-2] != b.shape[-1]:
            self.keys.append(b.transpose(-2, -1).clone())
        for operand, axis, values, order in ((a, -1, b, factors.orders[0]), (b, -2, None, factors.orders[1])):
            found = self.came_from(operand, axis, order) if self.square(operand, axis) else None
            if found is None:
                continue
            self.weighed.append(Weighed(operand.clone(), axis, *found, line_now(self.names)))
            flattened = operand.dim() < self.softmaxes[-1][1].dim()  # heads can no longer be told from rows
            if values is not None and self.keys and not flattened:
                self.pairs.append((self.keys[-1], values.clone(), line_now(self.names)))
            self.softmaxes.clear()
            self.keys.clear()
            return

    def square(self, x: Tensor, axis: int) -> bool:
        """Whether x is [..., T, S] with S ≥ T, or its transpose, with the keys along `axis`; T times heads, perhaps."""
        queries = x.shape[-2 if axis == -1 else -1]
        return queries > 0 and queries % self.T == 0 and self.T <= x.shape[axis]

    def came_from(self, x: Tensor, axis: int, order: list[int] | None) -> tuple[int, float] | None:
        """The axis of the softmax whose result times a factor is x, and the factor; `order` is how x was rearranged.

        The result of a softmax over another axis may have been masked since: then its nonzero entries are compared.
        """
        seen = self.softmaxes[::-1]
        if order is not None:
            alike = [(a, r) for a, r in seen if r.dim() == len(order)]
            seen += [(order.index(a % len(order)) - len(order), r.permute(order)) for a, r in alike]
        seen += [({-1: -2, -2: -1}.get(a, a), r.mT) for a, r in seen]
        for along, result in seen:
            if result.shape[axis:] != x.shape[axis:] or result.numel() != x.numel():
                continue
            result = result.reshape(x.shape)  # [B * H, T, S] as it enters bmm; [B, G, H / G * T, S] for shared keys
            left = x != 0
            known = multiple(result, x) or (multiple(result[left], x[left]) if along != axis else None)
            if known is not None and abs(known[1]) <= EXACT:
                return along, known[0]
        return None


def sharing(x: Tensor) -> list[int]:
    """For every head of [..., H, S, D], the first head that holds the same numbers."""
    heads = x.transpose(0, -3).flatten(1)
    return [next((i for i in range(h) if torch.equal(heads[i], heads[h])), h) for h in range(len(heads))]
