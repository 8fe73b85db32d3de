"""The factor between the products of queries and keys and the scores that a softmax is taken of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..expect import Where
from .location import line_now
from .operations import fused_attention, product, softmax_axis, softmax_input
from .products import names_of

FITS = 1e-9  # share of the scores' variance that a factor alone may leave unexplained


@dataclass(frozen=True)
class ScoreScale:
    """The factor of one attention's scores, and the line that applies the softmax."""

    factor: float
    head_width: int  # of the queries and keys that are multiplied
    where: Where | None

    @property
    def of_usual(self) -> float:
        """The factor as a multiple of 1/√D."""
        return self.factor * math.sqrt(self.head_width)


class ScoreScales(TorchFunctionMode):
    """Records the factor of every attention's scores: what a fused kernel is given, or what is measured.

    It is measured by regressing the input of a softmax on the last product of queries and keys.
    """

    def __init__(self, model: nn.Module, T: int) -> None:
        super().__init__()
        self.names, self.T = names_of(model), T
        self.found: list[ScoreScale] = []
        self.product: tuple[Tensor, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.product is not None and softmax_axis(func, args, kwargs) == -1:
            self._regress(softmax_input(args, kwargs), *self.product)
            self.product = None
        if (given := fused_attention(func, args, kwargs)) is not None:
            self.found.append(ScoreScale(given.factor, given.query.shape[-1], line_now(self.names)))
        elif (factors := product(func, args, kwargs)) is not None:
            left, right = factors.left.detach(), factors.right.detach()
            width, square = left.shape[-1], left.shape[-2] == right.shape[-1] == self.T
            if square and width != self.T and min(left.dim(), right.dim()) > 2:
                self.product = (left @ right, width)  # not what the call gives, which may be scaled already
        return func(*args, **kwargs)

    def _regress(self, scores: Tensor, product: Tensor, width: int) -> None:
        if scores.numel() != product.numel() or scores.shape[-2:] != product.shape[-2:]:
            return
        product = product.reshape(scores.shape)
        seen = torch.ones(self.T, self.T, dtype=torch.bool, device=scores.device).tril().expand_as(scores)
        x, y = product[seen].double(), scores.detach()[seen].double()
        if not bool(y.isfinite().all()):
            return
        factor = (x * y).sum() / x.square().sum()
        if float((y - factor * x).square().sum()) <= FITS**2 * float(y.square().sum()) * len(y):
            self.found.append(ScoreScale(float(factor), width, line_now(self.names)))
