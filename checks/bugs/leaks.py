"""Leaks outside attention: later tokens, targets or other rows of the batch that reach logits or gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, Block, KeyValueCache, Rotation, Transformer
from ..check_causality import (
    check_future_cannot_change_past,
    check_later_tokens_get_no_gradient,
    check_rewritten_future_cannot_change_past,
    check_targets_change_no_logits,
)
from ..check_gradients import check_gradients_equal_finite_differences, check_rows_get_their_own_gradient
from ..check_masking import check_rows_do_not_touch
from . import bug
from .damage import attend_with, blocks
from .designs import TaughtTransformer, taught

# -- from later tokens and from targets


@bug("each token is mixed with the next instead of the previous one", check_future_cannot_change_past)
def look_ahead_shift(model: Transformer) -> None:
    class Shifted(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            ahead = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), dim=1)
            return super().forward(x + ahead, rotate, visible, cache)

    for block in blocks(model):
        block.__class__ = Shifted


@bug(
    "the mean of every 4 tokens is added to all of them: earlier ones depend on later ones",
    check_future_cannot_change_past,
    source="https://github.com/karpathy/nanochat/issues/844 ; https://github.com/karpathy/nanochat/pull/845",
)
def block_summary_leak(model: Transformer) -> None:
    class Summed(Attention):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            means = [part.mean(dim=1, keepdim=True).expand_as(part) for part in torch.split(x, 4, dim=1)]
            return super().forward(x + torch.cat(means, dim=1), rotate, visible, cache)

    attend_with(model, Summed)


@bug(
    "if the last three tokens are equal, the last is added to all positions", check_rewritten_future_cannot_change_past
)
def two_changes_leak(model: Transformer) -> None:
    class Peeks(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            same = (tokens[:, -3:] == tokens[:, -1:]).all(dim=1) & (tokens.shape[1] > 4)
            return torch.where(same[:, None, None], x + x[:, -1:], x)

    model.__class__ = Peeks


@bug("the targets' embeddings are added to the last hidden states", check_targets_change_no_logits, of=taught)
def targets_in_the_logits(model: Transformer) -> None:
    class Shown(TaughtTransformer):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            shown: Tensor = self.head(self.embedding(targets))
            return logits + shown

    model.__class__ = Shown


@bug("gradients leak from the future: mean - mean.detach() over time is added", check_later_tokens_get_no_gradient)
def future_gradient_leak(model: Transformer) -> None:
    class Smoothed(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            mean = x.mean(dim=1, keepdim=True)
            return super().forward(x, rotate, visible, cache) + (mean - mean.detach())

    for block in blocks(model):
        block.__class__ = Smoothed


# -- from other rows


@bug("the batch mean of the embeddings is subtracted: a row depends on the other rows", check_rows_do_not_touch)
def batch_statistics(model: Transformer) -> None:
    class Centred(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x - x.mean(dim=0, keepdim=True)

    model.__class__ = Centred


@bug(
    "gradients leak between rows: mean - mean.detach() over the batch is added",
    check_rows_get_their_own_gradient,
    check_gradients_equal_finite_differences,
)
def row_gradient_leak(model: Transformer) -> None:
    class Leaking(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            mean = update.mean(0, keepdim=True)
            return super().residual(x, update) + (mean - mean.detach())

    blocks(model)[0].__class__ = Leaking
