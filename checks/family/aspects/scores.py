"""The factor between a query's product with a key and what enters the softmax, read where it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...expect import Where
from ...watch.location import line_now

PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "einsum", "baddbmm"}
FITS = 1e-9  # of the scores' variance: what a factor alone leaves unexplained


@dataclass(frozen=True)
class Scale:
    factor: float
    head_width: int
    where: Where | None

    @property
    def of_usual(self) -> float:
        """1 for scores divided by √D."""
        return self.factor * self.head_width**0.5


class Scales(TorchFunctionMode):
    """Sees each attention's factor: as the fused kernel is given it, or by regressing softmax inputs on products."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.found: list[Scale] = []
        self.product: tuple[Tensor, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "softmax" and self.product is not None:
            self._regress(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            q = args[0] if args else kwargs["query"]
            factor = kwargs.get("scale", None)
            self.found.append(Scale(q.shape[-1] ** -0.5 if factor is None else float(factor), q.shape[-1], line_now()))
        elif name in PRODUCTS and isinstance(result, Tensor) and result.shape[-2:] == (self.T, self.T):
            operands = [a for a in _flat(args) if isinstance(a, Tensor) and a.dim() > 2]
            if operands and operands[0].shape[-1] != self.T:
                self.product = (result.detach().clone(), operands[0].shape[-1])
        return result

    def _regress(self, scores: Tensor) -> None:
        product, width = self.product  # type: ignore[misc]
        self.product = None
        if scores.shape != product.shape:
            return
        seen = torch.ones(self.T, self.T, dtype=torch.bool, device=scores.device).tril().expand_as(scores)
        x, y = product[seen].double(), scores.detach()[seen].double()
        if not bool(y.isfinite().all()):
            return
        factor = (x * y).sum() / x.square().sum()
        if float((y - factor * x).square().sum()) <= FITS**2 * float(y.square().sum()) * len(y):
            self.found.append(Scale(float(factor), width, line_now()))


def _flat(args: Any) -> list[Any]:
    return [leaf for a in args for leaf in (a if isinstance(a, list | tuple) else (a,))]
