"""A model with every attention, or every feed-forward, set to zero.

Whatever still reaches the logits passed around it, through a residual connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..expect import Where
from ..subject import Subject
from ..watch.location import line_now
from ..watch.operations import weights_axis
from ..watch.products import Mapped, WeightProducts, multiplied, names_of
from .ablation import blocks_of
from .influence import call, length
from .precision import spread

STRAIGHT = 1e-6  # relative: by how much equal slopes may differ in float32


class Silence(TorchFunctionMode):
    """Inside, attention in the blocks gives zeros, or products with the given weight matrices do.

    Attention is any fused attention, and any softmax over scores [.., T, .., S, ..] with S = T. With `only`, the one
    of that number alone gives zeros. `found` lists the places of all.
    """

    def __init__(self, model: nn.Module, T: int, matrices: Collection[int] | None = None) -> None:
        super().__init__()
        self.names, self.blocks, self.T = names_of(model), blocks_of(model), T
        self.matrices = matrices  # None: attention
        self.only: int | None = None
        self.found: list[Where] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        known = None if self.matrices is None else multiplied(func, args)
        attends = self.matrices is None and self.attends(func, args, kwargs, result)
        meant = attends or (known is not None and known[1].data_ptr() in (self.matrices or ()))
        where = line_now(self.names) if meant else None
        if where is None or block_of(where, self.blocks) is None:
            return result
        self.found.append(where)
        if self.only not in (None, len(self.found) - 1):
            return result
        return (result[0] * 0, *result[1:]) if isinstance(result, tuple) else torch.zeros_like(result)

    def attends(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
        if func in (F.scaled_dot_product_attention, F.multi_head_attention_forward):
            return True
        return weights_axis(func, args, kwargs, result) is not None and list(result.shape).count(self.T) > 1


def block_of(where: Where | None, blocks: list[str]) -> str | None:
    """The block that a line runs in; None outside all blocks."""
    return next((block for block in blocks if where is not None and f"{where.module}.".startswith(f"{block}.")), None)


@dataclass(frozen=True)
class FeedForward:
    """A product that narrows rows, an earlier one that widened them, and the slopes between the two.

    `slopes` [N, F] is the gradient of the narrow product's summed input with respect to the wide product's output.
    """

    wide: Mapped
    narrow: Mapped
    slopes: Tensor

    @property
    def passed_on(self) -> float | None:
        """The one factor between the two products; None if what lies between them is not linear."""
        first = self.slopes.flatten()[0]
        alike = (self.slopes - first).abs().max() <= STRAIGHT * first.abs()
        return float(first) if bool(alike) and float(first) else None


def feed_forwards(model: nn.Module, run: Callable[[], Any]) -> list[FeedForward]:
    """Pairs of products in one block, of which the second narrows what the first widened, token by token.

    Nothing between the two may mix tokens. Otherwise attention with heads wider than the model would count too.
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
    """The narrowing matrices of feed-forwards in blocks, if they are parameters. Others are made anew in every call."""
    blocks = blocks_of(model)
    found = {pair.narrow.matrix for pair in feed_forwards(model, run) if block_of(pair.narrow.where, blocks)}
    held = [p.untyped_storage() for p in model.parameters()]
    return {m for m in found if any(h.data_ptr() <= m < h.data_ptr() + h.nbytes() for h in held)}


def silences(subject: Subject, model: nn.Module) -> dict[str, Silence]:
    """A `Silence` for attention and one for the feed-forwards, each if it is recognized."""
    T = length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    attention = Silence(model, T)
    with attention:
        call(subject, model, tokens)
    matrices = narrowing_in_blocks(model, lambda: subject.logits(model, tokens))
    parts = {"attention": attention} if attention.found else {}
    return parts | ({"feed-forward": Silence(model, T, matrices)} if matrices else {})


def last_logits_change(
    subject: Subject, model: nn.Module, silence: Silence, *, only: int | None = None, itself: bool | None = None
) -> float:
    """How far other tokens move the last logits while a part is silent, in standard deviations of the logits.

    Without attention the last token is changed too, since it is all that can be seen. Without feed-forwards only the
    earlier tokens are changed, whose effect comes through attention. `itself` overrides this choice.
    """
    tokens = subject.tokens(3, length(subject), seed=subject.seed)
    others = (tokens + 1 + torch.arange(tokens.shape[1], device=tokens.device) % 3) % subject.sizes.vocab_size
    if not (silence.matrices is None if itself is None else itself):
        others[:, -1] = tokens[:, -1]
    logits = []
    for each in (tokens, others):
        silence.only = only
        silence.found.clear()
        with silence:
            logits.append(call(subject, model, each)[:, -1])
    moves = float((logits[0] - logits[1]).abs().max()) / spread(call(subject, model, tokens))
    return moves if math.isfinite(moves) else math.inf  # silence broke the model: nothing is known
