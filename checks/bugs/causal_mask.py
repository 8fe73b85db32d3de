"""Wrong causal masks: missing, missing on one path, off by one, too strict, or too weak."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import Attention, ExplicitAttention, Transformer, causal_mask
from ..check_causality import (
    check_future_cannot_change_past,
    check_future_cannot_change_past_by_another_attention,
    check_future_cannot_change_past_in_long_sequences,
    check_future_cannot_change_past_in_low_precision,
    check_future_cannot_change_past_in_training,
    check_future_cannot_change_past_with_extreme_weights,
    check_past_reaches_every_later_position,
)
from ..check_contract import check_logits_are_finite
from ..check_memorization import check_memorizes_two_strings_with_the_same_middle
from . import bug
from .damage import attend_with

# -- missing


class Unmasked(ExplicitAttention):
    """Masks out padding, where there is any, and never the future."""

    def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores


@bug(
    "no causal mask: every position attends to the future",
    check_future_cannot_change_past,
    source="https://github.com/huggingface/transformers/issues/48745 ; "
    "https://github.com/keras-team/keras/issues/21284",
    attention="explicit",
)
def no_causal_mask(model: Transformer) -> None:
    attend_with(model, Unmasked)


@bug(
    "no causal mask in training mode: it is applied in eval mode only",
    check_future_cannot_change_past_in_training,
    source="https://github.com/keras-team/keras/issues/23038 ; https://github.com/facebookresearch/xformers/issues/103",
    attention="explicit",
)
def causal_mask_dropped_on_a_branch(model: Transformer) -> None:
    class Forgets(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores if self.training else super().mask(scores, visible)

    attend_with(model, Forgets)


@bug(
    "no causal mask with dropout on: that path forgets is_causal",
    check_future_cannot_change_past_in_training,
    source="https://github.com/keras-team/keras/issues/23038",
)
def causal_mask_dropped_with_dropout(model: Transformer) -> None:
    class Forgets(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if self.training and self.dropout > 0:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=self.dropout)
            return super().attend(q, k, v, visible)

    attend_with(model, Forgets)


@bug(
    "no causal mask in the fallback for a PyTorch without fused attention",
    check_future_cannot_change_past_by_another_attention,
    source="https://github.com/facebookresearch/xformers/issues/103",
)
def causal_mask_only_in_the_fused_path(model: Transformer) -> None:
    if not hasattr(F, "scaled_dot_product_attention"):
        attend_with(model, Unmasked)


@bug(
    "no causal mask in the first layer; the others are right",
    check_future_cannot_change_past,
    source="https://github.com/huggingface/transformers/issues/31673",
    attention="explicit",
)
def causal_mask_wrong_in_some_layers(model: Transformer) -> None:
    attend_with(model, Unmasked, slice(1))


@bug(
    "no causal mask in the last layer; the others are right",
    check_future_cannot_change_past,
    source="https://github.com/huggingface/transformers/issues/31673",
    attention="explicit",
)
def last_layer_unmasked(model: Transformer) -> None:
    attend_with(model, Unmasked, slice(-1, None))


@bug("the causal mask covers only 64 tokens", check_future_cannot_change_past_in_long_sequences, attention="explicit")
def causal_hardcoded_length(model: Transformer) -> None:
    class Short(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 64:] = True
            return super().mask(scores, visible)

    attend_with(model, Short)


@bug("no causal mask beyond 256 tokens", check_future_cannot_change_past_in_long_sequences, attention="explicit")
def unmasked_beyond_256(model: Transformer) -> None:
    class Tabled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible if scores.shape[-1] <= 256 else torch.ones_like(visible))

    attend_with(model, Tabled)


@bug("no causal mask beyond 1000 tokens", check_future_cannot_change_past_in_long_sequences, attention="explicit")
def unmasked_beyond_1000(model: Transformer) -> None:
    class Tabled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible if scores.shape[-1] <= 1000 else torch.ones_like(visible))

    attend_with(model, Tabled)


# -- off by one, or wrong at one position


@bug("causal mask off by one: each position sees the next", check_future_cannot_change_past, attention="explicit")
def causal_sees_one_future(model: Transformer) -> None:
    class Next(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            T, S = scores.shape[-2:]
            return super().mask(scores, visible | causal_mask(T, S, scores.device).new_ones(T, S).tril(S - T + 1))

    attend_with(model, Next)


@bug("the causal mask excludes the token itself (the diagonal)", check_future_cannot_change_past, attention="explicit")
def causal_excludes_self(model: Transformer) -> None:
    class Strict(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            T, S = scores.shape[-2:]
            earlier = visible & visible.new_ones(T, S).tril(S - T - 1)
            return scores.masked_fill(~earlier, torch.finfo(scores.dtype).min)

    attend_with(model, Strict)


@bug("position 5 attends to position 6; the others are right", check_future_cannot_change_past, attention="explicit")
def one_position_leaks(model: Transformer) -> None:
    class Leaks(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 5:6, 6:7] = True
            return super().mask(scores, visible)

    attend_with(model, Leaks)


@bug(
    "attention in chunks of 50 tokens: the last token of a chunk attends to the first of the next",
    check_future_cannot_change_past_in_long_sequences,
    attention="explicit",
)
def chunk_boundary_leaks(model: Transformer) -> None:
    class Chunked(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            for last in range(49, scores.shape[-1] - 1, 50):
                visible[..., last, last + 1] = True
            return super().mask(scores, visible)

    attend_with(model, Chunked)


# -- too strict


@bug("no token attends to any earlier token", check_past_reaches_every_later_position, attention="explicit")
def attention_sees_itself_only(model: Transformer) -> None:
    class Itself(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible & visible.new_ones(scores.shape[-2:]).triu())

    attend_with(model, Itself)


@bug("each token attends only to itself, in every layer", check_memorizes_two_strings_with_the_same_middle)
def attention_forgets_the_past(model: Transformer) -> None:
    class Itself(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            T, S = q.shape[2], k.shape[2]
            itself = torch.arange(S, device=q.device) == torch.arange(S - T, S, device=q.device)[:, None]
            return super().attend(q, k, v, itself)

    attend_with(model, Itself)


@bug("the first token is masked out for all later ones", check_past_reaches_every_later_position, attention="explicit")
def first_token_never_seen(model: Transformer) -> None:
    class Skips(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 1:, 0] = False
            return super().mask(scores, visible)

    attend_with(model, Skips)


@bug("all tokens after the first 64 are masked out", check_past_reaches_every_later_position, attention="explicit")
def late_tokens_never_seen(model: Transformer) -> None:
    class Short(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            itself = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
            early = torch.arange(scores.shape[-1], device=scores.device) < 64
            return super().mask(scores, visible & (early | itself))

    attend_with(model, Short)


# -- how scores are masked


def filled(value: float | Callable[[Tensor], float]) -> type[ExplicitAttention]:
    class Filled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.masked_fill(~visible, value(scores) if callable(value) else value)

    return Filled


@bug(
    "masked scores are set to -10 instead of -inf: the future keeps a weight that training can use",
    check_future_cannot_change_past,
    source="https://github.com/karpathy/minGPT/issues/75 ; "
    "https://github.com/TransformerLensOrg/TransformerLens/pull/366",
    attention="explicit",
)
def mask_fill_not_negative_enough(model: Transformer) -> None:
    attend_with(model, filled(-10.0))


@bug(
    "masked scores are set to -10000 instead of -inf: real scores can be lower",
    check_future_cannot_change_past_with_extreme_weights,
    source="https://github.com/karpathy/minGPT/issues/75",
    attention="explicit",
)
def mask_fill_of_minus_ten_thousand(model: Transformer) -> None:
    attend_with(model, filled(-1e4))


@bug(
    "masked scores are set to -10 instead of -inf in half precision, to avoid overflow",
    check_future_cannot_change_past_in_low_precision,
    source="https://github.com/huggingface/transformers/pull/18185",
    attention="explicit",
)
def mask_fill_weak_in_half_precision(model: Transformer) -> None:
    attend_with(model, filled(lambda scores: -10.0 if scores.element_size() == 2 else -torch.inf))


@bug(
    "masked scores are set to -10 under autocast instead of -inf",
    check_future_cannot_change_past_in_low_precision,
    source="https://github.com/huggingface/transformers/pull/18185",
    attention="explicit",
)
def mask_fill_weak_under_autocast(model: Transformer) -> None:
    attend_with(model, filled(lambda scores: -10.0 if torch.is_autocast_enabled("cpu") else -torch.inf))


@bug(
    "masked scores are set to +inf instead of -inf: every weight is NaN",
    check_logits_are_finite,
    source="https://github.com/lucidrains/memory-compressed-attention/issues/2",
    attention="explicit",
)
def mask_positive_inf(model: Transformer) -> None:
    attend_with(model, filled(torch.inf))


@bug(
    "the mask is applied after the softmax: the future is in the denominator of every weight",
    check_future_cannot_change_past,
    source="https://github.com/huggingface/pytorch-image-models/pull/2236",
    attention="explicit",
)
def mask_multiplied_after_softmax(model: Transformer) -> None:
    class After(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if visible is None:
                visible = causal_mask(q.shape[2], k.shape[2], q.device)
            return (self.weights(self.scores(q, k)) * visible) @ v

    attend_with(model, After)


@bug("the boolean mask is added to the scores as 1 and 0", check_future_cannot_change_past, attention="explicit")
def bool_mask_added_as_float(model: Transformer) -> None:
    class Added(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + visible

    attend_with(model, Added)
