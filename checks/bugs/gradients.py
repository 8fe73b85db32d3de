"""Wrong gradients of right logits: detached tensors, changes in place, backwards written by hand, recomputation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...transformer.model import (
    Attention,
    Block,
    GeluFeedForward,
    KeyValueCache,
    LearnedPositions,
    Rotation,
    Transformer,
)
from ..check_gradients import (
    check_every_parameter_gets_a_gradient,
    check_gradients_equal_finite_differences,
    check_no_two_zero_factors_wait_for_each_other,
    check_training_gradients_equal_finite_differences,
)
from ..check_portability import check_recomputation_changes_nothing
from ..check_spec import check_gradients_agree
from . import bug
from .damage import GPT2, attend_with, blocks
from .designs import changed, low_rank

# -- detached tensors


@bug("the values are detached: their projection is never trained", check_gradients_equal_finite_differences)
def v_detached(model: Transformer) -> None:
    class Detached(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return super().attend(q, k, v.detach(), visible)

    attend_with(model, Detached)


@bug("the feed-forward of one block reads a detached input", check_gradients_equal_finite_differences)
def feed_forward_detached(model: Transformer) -> None:
    class Detached(GeluFeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    blocks(model)[0].feed_forward.__class__ = Detached


@bug(
    "the residual is detached (x.detach() + f(x)): lower layers lose part of their gradient",
    check_gradients_equal_finite_differences,
    source="https://github.com/lucidrains/CoCa-pytorch/issues/6",
)
def residual_detached(model: Transformer) -> None:
    class Detached(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return super().residual(x.detach(), update)

    blocks(model)[-1].__class__ = Detached


@bug("the residual is detached in training mode only", check_training_gradients_equal_finite_differences)
def gradient_wrong_in_training(model: Transformer) -> None:
    class Detached(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return super().residual(x.detach() if self.training else x, update)

    blocks(model)[-1].__class__ = Detached


@bug("half of a block's output is detached: its gradient is halved", check_gradients_equal_finite_differences)
def gradient_scaled(model: Transformer) -> None:
    class Half(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return super().residual(x, update / 2 + update.detach() / 2)

    blocks(model)[0].__class__ = Half


@bug("the norm's mean and variance are computed from x.detach()", check_gradients_equal_finite_differences)
def norm_statistics_detached(model: Transformer) -> None:
    class Detached(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            fixed = x.detach()
            mean, variance = fixed.mean(-1, keepdim=True), fixed.var(-1, keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    blocks(model)[-1].attention_norm.__class__ = Detached


@bug(
    "the position table is read through .data: it is never trained",
    check_every_parameter_gets_a_gradient,
    source="https://github.com/d2l-ai/d2l-en/pull/2121",
)
def position_table_detached(model: Transformer) -> None:
    class Detached(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + self.table.weight.data[positions]

    model.positions.__class__ = Detached


def without_gradient(model: Transformer) -> None:
    class Frozen(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return super().embed(tokens)

    model.__class__ = Frozen


@bug(
    "the embedding is read under no_grad: the tied weights are trained by the head alone",
    check_gradients_equal_finite_differences,
    source="https://github.com/ml-jku/helm/issues/3",
)
def embedding_no_grad(model: Transformer) -> None:
    without_gradient(model)


@bug(
    "the embedding is read under no_grad: it is never trained",
    check_every_parameter_gets_a_gradient,
    source="https://github.com/ml-jku/helm/issues/3",
    tied=False,
)
def untied_embedding_no_grad(model: Transformer) -> None:
    without_gradient(model)


@bug("the head's weight is detached: only the embedding trains it", check_gradients_equal_finite_differences)
def head_detached(model: Transformer) -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.detach())

    model.head.__class__ = Detached


# -- the backward


@bug(
    "a token's gradient is divided by its count in the batch (scale_grad_by_freq)",
    check_gradients_agree,
    check_gradients_equal_finite_differences,
    **GPT2,
)
def embedding_gradient_by_count(model: Transformer) -> None:
    model.embedding.scale_grad_by_freq = True


@bug("the norm's hand-written backward leaves out the gradient of the mean", check_gradients_equal_finite_differences)
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
            normed: Tensor = Normalize.apply(x, self.eps)  # type: ignore[no-untyped-call]
            return normed * self.weight + self.bias

    blocks(model)[0].feed_forward_norm.__class__ = ByHand


@bug(
    "x is changed in place after the norm has saved it for its backward",
    check_every_parameter_gets_a_gradient,
    source="https://github.com/allenai/longformer/issues/201",
)
def inplace_op_breaks_autograd(model: Transformer) -> None:
    class InPlace(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x.add_(self.dropout(update))

    for block in blocks(model):
        block.__class__ = InPlace


@bug("x.data is changed in place, which autograd does not notice", check_gradients_equal_finite_differences)
def inplace_op_hidden_from_autograd(model: Transformer) -> None:
    class Hidden(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            out = super().activation(x)
            x.data.clamp_(min=-1.0)
            return out

    blocks(model)[0].feed_forward.__class__ = Hidden


# -- activation checkpointing


@bug(
    "activation checkpointing recomputes a block with other dropout masks",
    check_training_gradients_equal_finite_differences,
    source="https://github.com/allenai/OLMo-core/pull/828",
)
def checkpoint_recompute_rng(model: Transformer) -> None:
    class Recomputed(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.training:
                return super().forward(x, rotate, visible, cache)
            y: Tensor = checkpoint(
                super().forward, x, rotate, visible, cache, use_reentrant=False, preserve_rng_state=False
            )
            return y

    for block in blocks(model):
        block.__class__ = Recomputed


class RecomputedBlock(Block):
    """A block that activation checkpointing can be turned on for."""

    gradient_checkpointing: bool

    def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if not self.gradient_checkpointing or not self.training:
            return super().forward(x, rotate, visible, cache)
        y: Tensor = checkpoint(super().forward, x, rotate, visible, cache, use_reentrant=False)
        return y


def recomputing(**config: Any) -> SimpleNamespace:
    """The reference with a switch for activation checkpointing, off at first."""

    def change(model: Transformer) -> None:
        for block in blocks(model):
            block.__class__ = RecomputedBlock
            block.gradient_checkpointing = False  # type: ignore[assignment]

    return changed(change, **config)


@bug(
    "activation checkpointing does not restore the random state: other units are dropped",
    check_recomputation_changes_nothing,
    source="https://github.com/openai/guided-diffusion/issues/167",
    of=recomputing,
)
def recomputation_drops_other_units(model: Transformer) -> None:
    class Careless(RecomputedBlock):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.gradient_checkpointing or not self.training:
                return Block.forward(self, x, rotate, visible, cache)
            y: Tensor = checkpoint(
                Block.forward, self, x, rotate, visible, cache, use_reentrant=False, preserve_rng_state=False
            )
            return y

    for block in blocks(model):
        block.__class__ = Careless


@bug("checkpointing runs a block under no_grad and never again", check_recomputation_changes_nothing, of=recomputing)
def recomputation_under_no_grad(model: Transformer) -> None:
    class Forgotten(RecomputedBlock):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.gradient_checkpointing or not self.training:
                return Block.forward(self, x, rotate, visible, cache)
            with torch.no_grad():
                return Block.forward(self, x, rotate, visible, cache)

    model.blocks[0].__class__ = Forgotten


@bug(
    "both factors of a low-rank update start at zero: neither ever gets a gradient",
    check_no_two_zero_factors_wait_for_each_other,
    of=low_rank,
)
def low_rank_factors_both_zero(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.zeros_(block.feed_forward.output.down.weight)
