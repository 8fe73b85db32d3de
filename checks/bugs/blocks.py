"""Bugs of what surrounds attention: norms, the residual stream, the feed-forward, the order of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.model import Block, GeluFeedForward, KeyValueCache, Rotation, Transformer
from . import bug

CAUSAL = "check_causality.check_future_cannot_change_past"
PAST = "check_causality.check_past_reaches_every_later_position"
PREFIX = "check_causality.check_prefix_gives_the_same_logits"
REACH = "check_gradients.check_every_parameter_gets_a_gradient"
SLOPES = "check_gradients.check_gradients_equal_finite_differences"
TRAINING_SLOPES = "check_gradients.check_training_gradients_equal_finite_differences"
ROWS = "check_gradients.check_rows_get_their_own_gradient"
DEPTH = "check_initialization.check_depth_does_not_blow_up"
BFLOAT16 = "check_numerics.check_bfloat16_stays_close"


def blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def norms(model: Transformer) -> list[nn.Module]:
    return [norm for block in blocks(model) for norm in (block.attention_norm, block.feed_forward_norm)]


# -- norms


@bug(
    "norm-over-sequence",
    "mean and variance are taken over time as well: every token sees all of them",
    source="https://github.com/jadore801120/attention-is-all-you-need-pytorch/pull/17",
    caught_by=(CAUSAL, PREFIX),
    model=True,
)
def norm_over_sequence(model: Transformer) -> None:
    class OverTime(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    blocks(model)[0].feed_forward_norm.__class__ = OverTime


@bug("norm-over-batch", "mean and variance are those of the batch: a row depends on the others",
     caught_by=(ROWS,), model=True)  # fmt: skip
def norm_over_batch(model: Transformer) -> None:
    class OverRows(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean(0, keepdim=True), x.var(0, keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    for norm in norms(model):
        norm.__class__ = OverRows


@bug(
    "norm-reused",
    "the attention's norm is used before the feed-forward too: the feed-forward's own never trains",
    source="https://github.com/ml-explore/mlx/issues/1636",
    caught_by=(REACH,),
    model=True,
)
def norm_reused(model: Transformer) -> None:
    class OneNorm(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            x = self.residual(x, self.attention(self.attention_norm(x), rotate, visible, cache))
            return self.residual(x, self.feed_forward(self.attention_norm(x)))

    blocks(model)[-1].__class__ = OneNorm


@bug("norm-statistics-detached", "mean and variance are taken of x.detach(): the norm has the gradient of a scaling",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def norm_statistics_detached(model: Transformer) -> None:
    class Detached(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            fixed = x.detach()
            mean, variance = fixed.mean(-1, keepdim=True), fixed.var(-1, keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    blocks(model)[-1].attention_norm.__class__ = Detached


@bug("backward-of-its-own-wrong", "a norm with a backward written by hand that forgets the mean's share",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def backward_of_its_own_wrong(model: Transformer) -> None:
    class Normalize(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
            root = (x.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
            out = (x - x.mean(-1, keepdim=True)) * root
            ctx.save_for_backward(out, root)
            return out

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
            (gradient,), (out, root) = gradients, ctx.saved_tensors
            return (gradient - out * (gradient * out).mean(-1, keepdim=True)) * root, None

    class ByHand(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return Normalize.apply(x, self.eps) * self.weight + self.bias

    blocks(model)[0].feed_forward_norm.__class__ = ByHand


@bug(
    "rms-in-half-precision",
    "the mean square is summed up in bfloat16, where a large sum no longer moves",
    source="https://github.com/sgl-project/sglang/pull/27540",
    caught_by=(BFLOAT16,),
    model=True,
    norm="rms",
)
def rms_in_half_precision(model: Transformer) -> None:
    class InItsOwnType(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x[..., 0])
            for feature in x.unbind(-1):
                total = total + feature * feature
            return x * (total / x.shape[-1] + (self.eps or 0.0)).rsqrt()[..., None] * self.weight

    for norm in norms(model):
        norm.__class__ = InItsOwnType


# -- the residual stream


@bug(
    "residual-doubled",
    "x = x + x: what attention and feed-forward compute is thrown away",
    source="https://github.com/kyegomez/BitNet/issues/32",
    caught_by=(REACH, PAST, DEPTH),
    model=True,
)
def residual_doubled(model: Transformer) -> None:
    class Doubled(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + x

    for block in blocks(model):
        block.__class__ = Doubled


@bug(
    "residual-detached",
    "x.detach() + update: what lies below gets a part of its gradient only",
    source="https://github.com/lucidrains/CoCa-pytorch/issues/6",
    caught_by=(SLOPES,),
    model=True,
)
def residual_detached(model: Transformer) -> None:
    class Detached(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x.detach() + self.dropout(update)

    blocks(model)[-1].__class__ = Detached


@bug("gradient-wrong-in-training", "the residual stream is detached in training mode only",
     caught_by=(TRAINING_SLOPES,), model=True)  # fmt: skip
def gradient_wrong_in_training(model: Transformer) -> None:
    class Detached(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return (x.detach() if self.training else x) + self.dropout(update)

    blocks(model)[-1].__class__ = Detached


@bug("gradient-scaled", "half of an update joins the residual stream detached: its gradient is half too small",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def gradient_scaled(model: Transformer) -> None:
    class Half(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + self.dropout(update / 2 + update.detach() / 2)

    blocks(model)[0].__class__ = Half


@bug("row-gradient-leak", "the mean over rows is added and, detached, taken away: only gradients show it",
     caught_by=(ROWS, SLOPES), model=True)  # fmt: skip
def row_gradient_leak(model: Transformer) -> None:
    class Leaking(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            mean = update.mean(0, keepdim=True)
            return x + self.dropout(update) + (mean - mean.detach())

    blocks(model)[0].__class__ = Leaking


# -- feed-forward and blocks


@bug("feed-forward-detached", "one block's feed-forward reads a detached input",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def feed_forward_detached(model: Transformer) -> None:
    class Detached(GeluFeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    blocks(model)[0].feed_forward.__class__ = Detached


@bug(
    "inplace-op-breaks-autograd",
    "x is changed in place after the norm has saved it for its backward",
    source="https://github.com/allenai/longformer/issues/201",
    caught_by=(REACH,),
    model=True,
)
def in_place_residual(model: Transformer) -> None:
    class InPlace(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x.add_(self.dropout(update))

    for block in blocks(model):
        block.__class__ = InPlace


@bug("inplace-op-hidden-from-autograd", "x.data is changed in place, where autograd does not see it",
     caught_by=(SLOPES,), model=True)  # fmt: skip
def in_place_hidden(model: Transformer) -> None:
    class Hidden(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            out = super().activation(x)
            x.data.clamp_(min=-1.0)
            return out

    blocks(model)[0].feed_forward.__class__ = Hidden


@bug("last-block-skipped", "the loop over the blocks ends one early: the last never trains", caught_by=(REACH,),
     model=True)  # fmt: skip
def last_block_skipped(model: Transformer) -> None:
    class Skipped(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            return x

    blocks(model)[-1].__class__ = Skipped
