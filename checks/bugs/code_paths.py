"""Mistakes on one code path only: a long sequence, a large batch, autocast, recorded gradients, recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import ExplicitAttention, KeyValueCache, Rotation, Transformer
from ..check_paths import (
    check_calls_repeat_on_any_path,
    check_future_cannot_change_past_on_any_path,
    check_padding_is_unread_on_any_path,
    check_prefixes_agree_on_any_path,
    check_rows_do_not_touch_on_any_path,
)
from . import bug
from .causal_mask import Unmasked
from .damage import attend_with, blocks, redefine
from .gradients import RecomputedBlock, recomputing


def under_autocast() -> bool:
    return torch.is_autocast_enabled("cpu")


# -- rows


@bug("beyond 64 tokens each row is averaged with its neighbour", check_rows_do_not_touch_on_any_path)
def rows_mix_in_long_sequences(model: Transformer) -> None:
    class Rolled(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x if tokens.shape[1] <= 64 else (x + x.roll(1, 0)) / 2

    model.__class__ = Rolled


@bug("under autocast each row gets a little of its neighbour", check_rows_do_not_touch_on_any_path)
def rows_mix_under_autocast(model: Transformer) -> None:
    class Rolled(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + 0.05 * x.roll(1, 0) if under_autocast() else x

    model.__class__ = Rolled


@bug(
    "batches of more than 32 rows are read in chunks, all with the first row of theirs",
    check_rows_do_not_touch_on_any_path,
)
def rows_mix_in_large_batches(model: Transformer) -> None:
    class Chunked(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x if len(x) <= 32 else torch.cat([chunk + chunk[:1] for chunk in torch.split(x, 32)])

    model.__class__ = Chunked


# -- padding and the causal mask


@bug("under autocast attention forgets the padding mask", check_padding_is_unread_on_any_path)
def pad_mask_lost_under_autocast(model: Transformer) -> None:
    class Forgets(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return super().attend(q, k, v, None if under_autocast() else visible)

    attend_with(model, Forgets)


@bug(
    "no causal mask where gradients are recorded: that path forgets it",
    check_future_cannot_change_past_on_any_path,
    attention="explicit",
)
def causal_mask_lost_with_gradients(model: Transformer) -> None:
    class Forgets(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores if self.training and torch.is_grad_enabled() else super().mask(scores, visible)

    attend_with(model, Forgets)


@bug(
    "the mask is not passed on to blocks that activation checkpointing runs",
    check_future_cannot_change_past_on_any_path,
    of=recomputing,
    attention="explicit",
)
def causal_mask_lost_in_recomputation(model: Transformer) -> None:
    class Forgetful(RecomputedBlock):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            self.attention.__class__ = Unmasked if self.gradient_checkpointing and self.training else ExplicitAttention
            return super().forward(x, rotate, visible, cache)

    for block in blocks(model):
        block.__class__ = Forgetful


# -- prefixes and repeats


@bug(
    "beyond 256 tokens positions are squeezed into the first 256, whatever the length",
    check_prefixes_agree_on_any_path,
    positions="rotary",
)
def positions_stretched_when_long(model: Transformer) -> None:
    place = model.positions.rotation

    def rotation(self: object, positions: Tensor, dtype: torch.dtype) -> Rotation:
        T = positions.shape[-1]
        turned: Rotation = place(positions if T <= 256 else positions * (256 / T), dtype)
        return turned

    redefine(model.positions, rotation=rotation)


@bug("under autocast noise is added in eval mode too", check_calls_repeat_on_any_path)
def noise_under_autocast(model: Transformer) -> None:
    class Noisy(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + 0.01 * torch.randn_like(x) if under_autocast() else x

    model.__class__ = Noisy
