"""A model with every attention, or every feed-forward, giving zeros: what then still gets through went past them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..expect import Where
from ..watch.location import line_now
from ..watch.products import Mapped, WeightProducts, multiplied, names_of
from .ablation import blocks_of

STRAIGHT = 1e-6  # relative: how far slopes may differ that are one, where the model computes in float32


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
        if where is None or block_of(where, self.blocks) is None:
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


def block_of(where: Where | None, blocks: list[str]) -> str | None:
    """The block that a line runs in; None outside of all."""
    return next((block for block in blocks if where is not None and f"{where.module}.".startswith(f"{block}.")), None)


@dataclass(frozen=True)
class FeedForward:
    """A product that narrows rows, one that had widened them from that width, and how the first depends on the second.

    `slopes` [N, F] are those of the sum of what the narrowing one is given.
    """

    wide: Mapped
    narrow: Mapped
    slopes: Tensor

    @property
    def passed_on(self) -> float | None:
        """The factor by which everything comes through, whatever it is; None where something bends it."""
        first = self.slopes.flatten()[0]
        alike = (self.slopes - first).abs().max() <= STRAIGHT * first.abs()
        return float(first) if bool(alike) and float(first) else None


def feed_forwards(model: nn.Module, run: Callable[[], Any]) -> list[FeedForward]:
    """The products that widen what another narrows again, where that depends on the same token's rows alone.

    Both are in one block, with nothing between that mixes tokens: the heads of attention may be wider than the model.
    """
    with torch.enable_grad(), WeightProducts(model) as products:
        run()
    found: list[FeedForward] = []
    blocks, begin = blocks_of(model), 0
    for index, narrow in enumerate(products.found):
        inner, outer = narrow.rows.shape[-1], narrow.gives.shape[-1]
        begin = max([begin, *(m for m in products.mixed if m <= index)])
        wide = [p for p in products.found[begin:index] if p.gives.shape == narrow.rows.shape]
        wide = [p for p in wide if p.rows.shape[-1] == outer < inner]
        wide = [p for p in wide if block_of(p.where, blocks) == block_of(narrow.where, blocks)]
        joined = [_joined(p, narrow) for p in wide]
        found += [pair for pair in joined if pair is not None]
        begin = index + 1 if any(joined) else begin
    return found


def _joined(wide: Mapped, narrow: Mapped) -> FeedForward | None:
    if not narrow.rows.requires_grad:
        return None
    last, every = (
        torch.autograd.grad(rows.sum(), wide.gives, retain_graph=True, allow_unused=True)[0]
        for rows in (narrow.rows[-1], narrow.rows)
    )
    if last is None or not bool(last[-1].any()) or bool(last[:-1].any()):
        return None
    return FeedForward(wide, narrow, every)


def narrowing_in_blocks(model: nn.Module, run: Callable[[], Any]) -> set[int]:
    """The narrowing matrices of feed-forwards in blocks that the model holds: others are made anew in every call."""
    blocks = blocks_of(model)
    found = {pair.narrow.matrix for pair in feed_forwards(model, run) if block_of(pair.narrow.where, blocks)}
    held = [p.untyped_storage() for p in model.parameters()]
    return {m for m in found if any(h.data_ptr() <= m < h.data_ptr() + h.nbytes() for h in held)}
