"""Wrong learned position embeddings, and wrong positions for any kind of them: constant, cyclic, clamped, shifted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...transformer.model import Block, LearnedPositions, Transformer
from ..check_causality import check_prefix_gives_the_same_logits
from ..check_masking import check_left_padding_changes_nothing, check_right_padding_changes_nothing
from ..check_positions import check_order_of_tokens_matters
from ..check_spec import check_logits_agree
from . import bug
from .damage import GPT2, blocks, redefine

# -- how they are added


@bug(
    "position embeddings are looked up and never added: the model has no positions",
    check_logits_agree,
    source="https://github.com/guocheng2025/Transformer-Encoder/issues/1",
    **GPT2,
)
def position_not_added(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x)


@bug("position embeddings are multiplied with token embeddings instead of added", check_logits_agree, **GPT2)
def position_multiplied(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x * self.table(positions))


@bug("position embeddings are multiplied by √C before they are added", check_logits_agree, **GPT2)
def position_scaled(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x + self.table(positions) * x.shape[-1] ** 0.5)


@bug("position embeddings are divided by √C before they are added, as in x-transformers", check_logits_agree, **GPT2)
def position_divided(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x + self.table(positions) * x.shape[-1] ** -0.5)


@bug("position embeddings are added again before every block but the first", check_logits_agree, **GPT2)
def position_in_every_block(model: Transformer) -> None:
    table = model.positions

    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        return Block.forward(self, table.add(x, torch.arange(x.shape[1], device=x.device)), *others)

    for block in blocks(model)[1:]:
        redefine(block, forward=forward)


@bug("position t reads row t + 1 of the position table, and the last position row 0", check_logits_agree, **GPT2)
def position_offset_by_one(model: Transformer) -> None:
    def add(self: LearnedPositions, x: Tensor, positions: Tensor) -> Tensor:
        return LearnedPositions.add(self, x, (positions + 1) % self.table.num_embeddings)

    redefine(model.positions, add=add)


@bug(
    "every token gets the same position embedding: pe[:, T] instead of pe[:, :T]",
    check_order_of_tokens_matters,
    source="https://github.com/DiffPoseTalk/DiffPoseTalk/issues/20",
)
def position_constant(model: Transformer) -> None:
    class Constant(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().add(x, positions[..., -1:])

    model.positions.__class__ = Constant


# -- which position a token gets


@bug("positions are counted from the end", check_prefix_gives_the_same_logits, check_right_padding_changes_nothing)
def position_reversed(model: Transformer) -> None:
    class FromTheEnd(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return S - 1 - super().token_positions(mask, T, S, device)

    model.__class__ = FromTheEnd


@bug("positions are taken modulo 8: token 8 gets the position of token 0", check_order_of_tokens_matters)
def positions_start_again(model: Transformer) -> None:
    class Cyclic(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device) % 8

    model.__class__ = Cyclic


@bug("positions are held in 7 bits: token 128 gets the position of token 0", check_order_of_tokens_matters)
def positions_start_again_at_128(model: Transformer) -> None:
    class Cyclic(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device) % 128

    model.__class__ = Cyclic


@bug("positions above 100 are clamped to 100", check_order_of_tokens_matters)
def positions_clamped(model: Transformer) -> None:
    class Clamped(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(mask, T, S, device).clamp(max=100)

    model.__class__ = Clamped


@bug(
    "positions count left padding: a short prompt does not start at position 0",
    check_left_padding_changes_nothing,
    source="https://github.com/unslothai/unsloth/issues/3699 ; https://github.com/ndif-team/nnsight/pull/673",
)
def left_pad_positions_not_from_mask(model: Transformer) -> None:
    class CountsPadding(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return super().token_positions(None, T, S, device)

    model.__class__ = CountsPadding
