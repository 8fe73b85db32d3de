"""A model with every attention, or every feed-forward, giving zeros: what then still gets through went past them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from checks.expect import Where
from checks.probes.ablation import siblings
from checks.probes.part_products import Mapped, WeightProducts, multiplied, names_of
from checks.where import line_now


class Silence(TorchFunctionMode):
    """Attention inside the blocks weighs nothing, or products with some matrices of weights give zeros.

    Fused attention gives zeros, and so does every softmax over scores [.., T, .., S, ..] with S = T. With `only`, this
    holds for the one of that number alone; `found` has the lines of all.
    """

    def __init__(self, model: nn.Module, T: int, matrices: Collection[int] | None = None) -> None:
        super().__init__()
        self.names, self.blocks, self.T = names_of(model), blocks_of(model), T
        self.matrices = matrices  # None: attention
        self.only: int | None = None
        self.found: list[Where] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = None if self.matrices is None else multiplied(func, args)
        meant = self.attends(func, result) if self.matrices is None else known and known[1].data_ptr() in self.matrices
        where = line_now(self.names) if meant else None
        if where is None or not within(where, self.blocks):
            return result
        self.found.append(where)
        if self.only not in (None, len(self.found) - 1):
            return result
        return (result[0] * 0, *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)

    def attends(self, func: Any, result: Any) -> bool:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            return True
        softmax = getattr(func, "__name__", "") == "softmax" and isinstance(result, Tensor) and result.dim() > 2
        return softmax and list(result.shape).count(self.T) > 1


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the model's blocks: what stands in the outermost list."""
    return next(iter(siblings(model)), [])


def within(where: Where | None, blocks: list[str]) -> bool:
    return where is not None and any(f"{where.module}.".startswith(f"{block}.") for block in blocks)


def feed_forwards(products: list[Mapped]) -> list[tuple[Mapped, Mapped]]:
    """Every product that narrows rows, with the last one before it that had widened as many from that width."""
    found = []
    for index, narrow in enumerate(products):
        inner, outer = narrow.rows.shape[-1], narrow.gives.shape[-1]
        before = [p for p in products[:index] if p.gives.shape == narrow.rows.shape and p.rows.shape[-1] == outer]
        if inner > outer and before:
            found.append((before[-1], narrow))
    return found


def feed_forward_outputs(model: nn.Module, run: Callable[[], Any]) -> list[Mapped]:
    """The narrowing products of feed-forwards in blocks: they are given what depends on the same token's widened rows.

    Attention whose heads are together wider than the model is told from them by that.
    """
    with torch.enable_grad(), WeightProducts(model, live=True) as products:
        run()
    pairs = [(wide, narrow) for wide, narrow in feed_forwards(products.found) if within(narrow.where, blocks_of(model))]
    return [narrow for wide, narrow in pairs if _same_row(wide.gives, narrow.rows)]


def _same_row(wide: Tensor, rows: Tensor) -> bool:
    if not (wide.requires_grad and rows.requires_grad):
        return False
    (slopes,) = torch.autograd.grad(rows[-1].sum(), wide, retain_graph=True, allow_unused=True)
    return slopes is not None and bool(slopes[-1].any()) and not bool(slopes[:-1].any())
