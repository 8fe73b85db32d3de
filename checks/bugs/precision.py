"""Bugs of precision: what is rounded, overflows or is summed in too narrow a type."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import ExplicitAttention, GeluFeedForward, RotaryPositions, Transformer
from . import bug

FLOAT32 = "check_numerics.check_float32_keeps_its_digits"
FLOAT16 = "check_numerics.check_float16_stays_close"
LONG = "check_numerics.check_long_sequences_stay_close"
EXTREME = "check_numerics.check_extreme_weights_give_finite_logits"


def explicit(model: Transformer, kind: type[ExplicitAttention]) -> None:
    for block in model.blocks:
        block.attention.__class__ = kind


@bug(
    "fp16-mask-overflow",
    "a mask filled with -1e9 becomes -inf in float16, and times 0 NaN",
    source="https://github.com/NVIDIA/apex/issues/1105 ; https://github.com/facebookresearch/fairseq/issues/3575",
    caught_by=(FLOAT16,),
    model=True,
    attention="explicit",
)
def mask_overflows(model: Transformer) -> None:
    class Added(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + (~visible).to(scores) * torch.tensor(-1e9).to(scores)

    explicit(model, Added)


@bug("rope-angles-by-matmul", "angles are a product of matrices, which autocast computes in bfloat16",
     source="https://github.com/huggingface/transformers/pull/29285", caught_by=(LONG,), model=True,
     positions="rotary")  # fmt: skip
def angles_by_matmul(model: Transformer) -> None:
    class Product(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            dtype = torch.promote_types(dtype, torch.float32)
            pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
            frequencies = self.base ** (-pairs / self.head_width)
            return positions.to(dtype)[..., None] @ frequencies[None]

    model.positions.__class__ = Product


@bug("downcast-inside", "the feed-forward computes in bfloat16 in a float32 model",
     caught_by=(FLOAT32,), model=True)  # fmt: skip
def downcast_inside(model: Transformer) -> None:
    class Narrow(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            return super().activation(x.bfloat16()).to(x.dtype)

    model.blocks[0].feed_forward.__class__ = Narrow


@bug("mask-added-and-subtracted", "scores are shifted by 1e4 and back: float32 keeps three digits of them",
     caught_by=(FLOAT32,), model=True, attention="explicit")  # fmt: skip
def digits_lost(model: Transformer) -> None:
    class Shifted(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask((scores - 1e4) + 1e4, visible)

    explicit(model, Shifted)


@bug("softmax-without-maximum", "exp(scores) / sum: scores above 88 overflow float32",
     caught_by=(EXTREME,), model=True, attention="explicit")  # fmt: skip
def softmax_without_maximum(model: Transformer) -> None:
    class Naive(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            e = scores.exp()
            return e / e.sum(dim=-1, keepdim=True)

    explicit(model, Naive)
