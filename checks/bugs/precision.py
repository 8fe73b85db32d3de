"""Wrong precision: overflow, rounding, autocast. Angles, norms and losses in bfloat16 are in files of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import ExplicitAttention, GeluFeedForward, Transformer
from ..check_devices import check_mixed_precision_keeps_the_gradient, check_precision_switches_are_left_alone
from ..check_numerics import (
    check_extreme_weights_give_finite_logits,
    check_float16_stays_close,
    check_float32_keeps_its_digits,
)
from . import bug
from .damage import attend_with, blocks

# -- overflow


@bug(
    "a mask of -1e9 overflows to -inf in float16, and -inf times 0 is NaN",
    check_float16_stays_close,
    source="https://github.com/NVIDIA/apex/issues/1105 ; https://github.com/facebookresearch/fairseq/issues/3575",
    attention="explicit",
)
def fp16_mask_overflow(model: Transformer) -> None:
    class Added(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + (~visible).to(scores) * torch.tensor(-1e9).to(scores)

    attend_with(model, Added)


@bug("a mask of -1e9 overflows under float16 autocast", check_mixed_precision_keeps_the_gradient, attention="explicit")
def fp16_autocast_mask_overflow(model: Transformer) -> None:
    class Multiplied(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + (~visible).to(scores) * torch.tensor(-1e9).to(scores)

    attend_with(model, Multiplied)


@bug("the softmax overflows: no maximum is subtracted", check_extreme_weights_give_finite_logits, attention="explicit")
def softmax_without_maximum(model: Transformer) -> None:
    class Naive(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            e = scores.exp()
            return e / e.sum(dim=-1, keepdim=True)

    attend_with(model, Naive)


# -- rounding


@bug("the feed-forward computes in bfloat16 in a float32 model", check_float32_keeps_its_digits)
def downcast_inside(model: Transformer) -> None:
    class Narrow(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            return super().activation(x.bfloat16()).to(x.dtype)

    model.blocks[0].feed_forward.__class__ = Narrow


@bug("scores lose digits: 1e4 is subtracted and added again", check_float32_keeps_its_digits, attention="explicit")
def mask_added_and_subtracted(model: Transformer) -> None:
    class Shifted(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask((scores - 1e4) + 1e4, visible)

    attend_with(model, Shifted)


# -- autocast and switches


@bug("under autocast the feed-forward casts through .data: no gradient", check_mixed_precision_keeps_the_gradient)
def autocast_cuts_the_gradient(model: Transformer) -> None:
    class Cut(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(x.device.type):
                x = x.data.to(torch.get_autocast_dtype(x.device.type))
            return super().activation(x)

    for block in blocks(model):
        block.feed_forward.__class__ = Cut


@bug(
    "a forward turns TF32 on for the whole process",
    check_precision_switches_are_left_alone,
    source="https://github.com/pytorch/pytorch/issues/67384",
)
def forward_turns_tf32_on(model: Transformer) -> None:
    class Hasty(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            torch.set_float32_matmul_precision("high")
            return super().embed(tokens)

    model.__class__ = Hasty
