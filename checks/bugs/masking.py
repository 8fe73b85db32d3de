"""Mistakes at the masks: who may look at whom, and how looking is prevented."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, Block, ExplicitAttention, KeyValueCache, Rotation, Transformer, causal_mask
from . import bug
from .designs import TaughtTransformer, taught

CAUSAL = "check_causality.check_future_cannot_change_past"
TRAINING = f"{CAUSAL}_in_training"
MASKED = f"{CAUSAL}_under_a_mask"
EXTREME = f"{CAUSAL}_with_extreme_weights"
LONG = f"{CAUSAL}_in_long_sequences"
ANOTHER = f"{CAUSAL}_by_another_attention"
CACHED = f"{CAUSAL}_into_a_cache"
LOW = f"{CAUSAL}_in_low_precision"
REWRITTEN = "check_causality.check_rewritten_future_cannot_change_past"
GRADIENT = "check_causality.check_later_tokens_get_no_gradient"
PAST = "check_causality.check_past_reaches_every_later_position"
WINDOW = "check_causality.check_one_block_sees_its_window"
FINITE = "check_contract.check_logits_are_finite"
ONES = "check_masking.check_mask_of_ones_changes_nothing"
CONTENT = "check_masking.check_pad_contents_change_nothing"
RIGHT = "check_masking.check_right_padding_changes_nothing"
HARMLESS = "check_masking.check_rows_of_padding_do_no_harm"
TYPES = "check_masking.check_mask_types_agree"
PACKED = "check_masking.check_packed_documents_stay_apart"
ROWS = "check_masking.check_rows_do_not_touch"


def attend_with(model: nn.Module, kind: type[Attention], layers: slice = slice(None)) -> None:
    """Makes the attention of these layers of another class."""
    for block in model.blocks[layers]:  # type: ignore[index, union-attr]
        block.attention.__class__ = kind


# -- the causal mask is not there


class Unmasked(ExplicitAttention):
    """Masks out padding, where there is any, and never the future."""

    def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores


@bug(
    "no-causal-mask",
    "the causal mask is missing: every position attends to the future",
    source="https://github.com/huggingface/transformers/issues/48745 ; https://github.com/keras-team/keras/issues/21284",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def no_causal_mask(model: Transformer) -> None:
    attend_with(model, Unmasked)


@bug(
    "causal-mask-dropped-on-a-branch",
    "the mask is applied in eval mode only: in training every position sees the future",
    source="https://github.com/keras-team/keras/issues/23038 ; https://github.com/facebookresearch/xformers/issues/103",
    caught_by=(TRAINING,),
    model=True,
    attention="explicit",
)
def unmasked_in_training(model: Transformer) -> None:
    class Forgets(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores if self.training else super().mask(scores, visible)

    attend_with(model, Forgets)


@bug(
    "causal-mask-dropped-with-dropout",
    "the branch that has dropout to do forgets is_causal",
    source="https://github.com/keras-team/keras/issues/23038",
    caught_by=(TRAINING,),
    model=True,
)
def unmasked_with_dropout(model: Transformer) -> None:
    class Forgets(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if self.training and self.dropout > 0:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=self.dropout)
            return super().attend(q, k, v, visible)

    attend_with(model, Forgets)


@bug(
    "causal-mask-only-in-the-fused-path",
    "where PyTorch has no fused attention the fallback forgets the mask",
    source="https://github.com/facebookresearch/xformers/issues/103",
    caught_by=(ANOTHER,),
    model=True,
)
def unmasked_without_fused_attention(model: Transformer) -> None:
    if not hasattr(F, "scaled_dot_product_attention"):
        attend_with(model, Unmasked)


@bug(
    "causal-mask-wrong-in-some-layers",
    "the first layer has no mask, the others are right",
    source="https://github.com/huggingface/transformers/issues/31673",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def first_layer_unmasked(model: Transformer) -> None:
    attend_with(model, Unmasked, slice(1))


@bug(
    "last-layer-unmasked",
    "the last layer has no mask, the others are right",
    source="https://github.com/huggingface/transformers/issues/31673",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def last_layer_unmasked(model: Transformer) -> None:
    attend_with(model, Unmasked, slice(-1, None))


@bug(
    "causal-hardcoded-length",
    "the mask is built for 64 tokens: what comes after them is open to all",
    caught_by=(LONG,),
    model=True,
    attention="explicit",
)
def mask_of_64_tokens(model: Transformer) -> None:
    class Short(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 64:] = True
            return super().mask(scores, visible)

    attend_with(model, Short)


@bug("chunk-boundary-leaks", "attention over chunks of 50 tokens: the last of a chunk sees the first of the next",
     caught_by=(LONG,), model=True, attention="explicit")  # fmt: skip
def chunk_boundary_leaks(model: Transformer) -> None:
    class Chunked(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            for last in range(49, scores.shape[-1] - 1, 50):
                visible[..., last, last + 1] = True
            return super().mask(scores, visible)

    attend_with(model, Chunked)


@bug("unmasked-beyond-256", "the mask is a table of 256 tokens: for a longer sequence there is none",
     caught_by=(LONG,), model=True, attention="explicit")  # fmt: skip
def unmasked_beyond_256(model: Transformer) -> None:
    class Tabled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible if scores.shape[-1] <= 256 else torch.ones_like(visible))

    attend_with(model, Tabled)


@bug("unmasked-beyond-1000", "the mask is a table of 1000 tokens: for a longer sequence there is none",
     caught_by=(LONG,), model=True, attention="explicit")  # fmt: skip
def unmasked_beyond_1000(model: Transformer) -> None:
    class Tabled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible if scores.shape[-1] <= 1000 else torch.ones_like(visible))

    attend_with(model, Tabled)


@bug("one-position-leaks", "position 5 sees token 6, which comes next; all other pairs are right",
     caught_by=(CAUSAL,), model=True, attention="explicit")  # fmt: skip
def one_position_leaks(model: Transformer) -> None:
    class Leaks(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 5:6, 6:7] = True
            return super().mask(scores, visible)

    attend_with(model, Leaks)


# -- the causal mask is another one


@bug("causal-sees-one-future", "the diagonal is off by one: each position sees the token that it is to predict",
     caught_by=(CAUSAL,), model=True, attention="explicit")  # fmt: skip
def sees_one_future(model: Transformer) -> None:
    class Next(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            T, S = scores.shape[-2:]
            return super().mask(scores, visible | causal_mask(T, S, scores.device).new_ones(T, S).tril(S - T + 1))

    attend_with(model, Next)


@bug("causal-excludes-self", "no token sees itself: the first sees nothing, and its softmax averages over all",
     caught_by=(CAUSAL,), model=True, attention="explicit")  # fmt: skip
def excludes_self(model: Transformer) -> None:
    class Strict(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            T, S = scores.shape[-2:]
            earlier = visible & visible.new_ones(T, S).tril(S - T - 1)
            return scores.masked_fill(~earlier, torch.finfo(scores.dtype).min)

    attend_with(model, Strict)


@bug(
    "block-summary-leak",
    "each block of 4 tokens is averaged and the mean given back to all of it",
    source="https://github.com/karpathy/nanochat/issues/844 ; https://github.com/karpathy/nanochat/pull/845",
    caught_by=(CAUSAL,),
    model=True,
)
def block_summary(model: Transformer) -> None:
    class Summed(Attention):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            means = [part.mean(dim=1, keepdim=True).expand_as(part) for part in x.split(4, dim=1)]
            return super().forward(x + torch.cat(means, dim=1), rotate, visible, cache)

    attend_with(model, Summed)


# -- what is masked is not out


def filled(value: float | Callable[[Tensor], float]) -> type[ExplicitAttention]:
    class Filled(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.masked_fill(~visible, value(scores) if callable(value) else value)

    return Filled


@bug(
    "mask-fill-not-negative-enough",
    "masked scores are set to -10: they count little at first, and training learns to use them",
    source="https://github.com/karpathy/minGPT/issues/75 ; https://github.com/TransformerLensOrg/TransformerLens/pull/366",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def filled_with_minus_ten(model: Transformer) -> None:
    attend_with(model, filled(-10.0))


@bug(
    "mask-fill-of-minus-ten-thousand",
    "masked scores are set to -10000: scores that grow below it let the future in",
    source="https://github.com/karpathy/minGPT/issues/75",
    caught_by=(EXTREME,),
    model=True,
    attention="explicit",
)
def filled_with_minus_ten_thousand(model: Transformer) -> None:
    attend_with(model, filled(-1e4))


@bug(
    "mask-fill-weak-in-half-precision",
    "in half precision, masked scores are set to -10 so that nothing overflows",
    source="https://github.com/huggingface/transformers/pull/18185",
    caught_by=(LOW,),
    model=True,
    attention="explicit",
)
def filled_by_precision(model: Transformer) -> None:
    attend_with(model, filled(lambda scores: -10.0 if scores.element_size() == 2 else -torch.inf))


@bug("mask-fill-weak-under-autocast", "under autocast masked scores are set to -10",
     source="https://github.com/huggingface/transformers/pull/18185", caught_by=(LOW,), model=True,
     attention="explicit")  # fmt: skip
def filled_by_autocast(model: Transformer) -> None:
    attend_with(model, filled(lambda scores: -10.0 if torch.is_autocast_enabled("cpu") else -torch.inf))


@bug(
    "mask-multiplied-after-softmax",
    "weights are zeroed after the softmax and no longer sum to 1: the future is in the denominator",
    source="https://github.com/huggingface/pytorch-image-models/pull/2236",
    caught_by=(CAUSAL,),
    model=True,
    attention="explicit",
)
def multiplied_after_softmax(model: Transformer) -> None:
    class After(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if visible is None:
                visible = causal_mask(q.shape[2], k.shape[2], q.device)
            return (self.weights(self.scores(q, k)) * visible) @ v

    attend_with(model, After)


@bug(
    "mask-positive-inf",
    "masked scores are set to +inf: every weight is NaN",
    source="https://github.com/lucidrains/memory-compressed-attention/issues/2",
    caught_by=(FINITE,),
    model=True,
    attention="explicit",
)
def filled_with_infinity(model: Transformer) -> None:
    attend_with(model, filled(torch.inf))


@bug("bool-mask-added-as-float", "the mask of True and False is added to the scores as 1 and 0",
     caught_by=(CAUSAL,), model=True, attention="explicit")  # fmt: skip
def added_as_float(model: Transformer) -> None:
    class Added(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores + visible

    attend_with(model, Added)


@bug("future-gradient-leak", "the sequence's mean is added and taken away again detached: only gradients see it",
     caught_by=(GRADIENT,), model=True)  # fmt: skip
def gradient_leak(model: Transformer) -> None:
    class Smoothed(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            mean = x.mean(dim=1, keepdim=True)
            return super().forward(x, rotate, visible, cache) + (mean - mean.detach())

    for block in model.blocks:
        block.__class__ = Smoothed


@bug("targets-in-the-logits", "the targets' embeddings are added to the last hidden state, as if to help",
     caught_by=("check_causality.check_targets_change_no_logits",), model=True, of=taught)  # fmt: skip
def targets_in_the_logits(model: Transformer) -> None:
    class Shown(TaughtTransformer):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            return logits + self.head(self.embedding(targets))

    model.__class__ = Shown


@bug("two-changes-leak", "only where the last two tokens are the same are they shown to all positions",
     caught_by=(REWRITTEN,), model=True)  # fmt: skip
def two_changes_leak(model: Transformer) -> None:
    class Peeks(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            same = (tokens[:, -3:] == tokens[:, -1:]).all(dim=1) & (tokens.shape[1] > 4)
            return torch.where(same[:, None, None], x + x[:, -1:], x)

    model.__class__ = Peeks


# -- padding


class OtherMask(Transformer):
    """Padding enters the mask in another way; the causal part is right."""

    def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
        """[B, 1 or H, T or 1, S]."""
        raise NotImplementedError

    def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
        if mask is None:
            return super().visible(mask, T, S, device)
        causal = causal_mask(T, S, device)
        itself = causal ^ causal.tril(S - T - 1)
        return (causal & self.padding(mask, T, device)) | itself


@bug("pad-mask-ignored", "the padding mask is taken and never used", caught_by=(CONTENT,), model=True)
def padding_ignored(model: Transformer) -> None:
    class Ignored(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            return super().visible(None, T, S, device)

    model.__class__ = Ignored


@bug(
    "bool-mask-semantics-inverted",
    "True means padding to the attention and real to the caller: only padding is attended to",
    source="https://github.com/InseeFrLab/torchTextClassifiers/pull/92 ; "
    "https://github.com/jadore801120/attention-is-all-you-need-pytorch/issues/148",
    caught_by=(ONES, CONTENT),
    model=True,
)
def inverted(model: Transformer) -> None:
    class Inverted(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            return ~mask[:, None, None, :]

    model.__class__ = Inverted


@bug(
    "pad-mask-on-queries",
    "the padding mask is laid over queries, not over keys: padding is still read",
    source="https://github.com/vllm-project/vllm-omni/issues/5865 ; https://github.com/pytorch/pytorch/issues/41508",
    caught_by=(CONTENT,),
    model=True,
)
def padding_on_queries(model: Transformer) -> None:
    class OnQueries(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            return mask[:, None, -T:, None]

    model.__class__ = OnQueries


@bug("pad-mask-replaces-causal", "where a padding mask is given it takes the place of the causal mask",
     caught_by=(MASKED,), model=True)  # fmt: skip
def padding_replaces_causal(model: Transformer) -> None:
    class Replaced(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            both = super().visible(mask, T, S, device)
            return both if mask is None or both is None else mask[:, None, None, :].expand_as(both)

    model.__class__ = Replaced


@bug(
    "mask-repeated-in-wrong-head-batch-order",
    "the mask is repeated row after row where the heads of a row stand side by side",
    source="https://github.com/lsdefine/attention-is-all-you-need-keras/issues/36",
    caught_by=(CONTENT, ROWS),
    model=True,
)
def repeated_in_wrong_order(model: Transformer) -> None:
    class Repeated(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            B, S = mask.shape
            return mask.repeat(self.config.n_head, 1).view(B, self.config.n_head, 1, S)

    model.__class__ = Repeated


@bug(
    "fully-masked-row-nan",
    "padding sees nothing, not even itself: its softmax is NaN, and so is what reads it",
    source="https://github.com/pytorch/pytorch/issues/41508 ; https://github.com/tracel-ai/burn/pull/4697",
    caught_by=(HARMLESS,),
    model=True,
    attention="explicit",
)
def nothing_to_see(model: Transformer) -> None:
    class Nothing(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            if mask is None:
                return super().visible(mask, T, S, device)
            return causal_mask(T, S, device) & mask[:, None, None, :]

    model.__class__ = Nothing


@bug("float-mask-added", "a mask of 0 and 1 as float is added to the scores, where the bool mask is right",
     caught_by=(TYPES,), model=True, attention="explicit")  # fmt: skip
def float_added(model: Transformer) -> None:
    class Adds(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            floating = mask is not None and mask.is_floating_point()
            return super().forward(tokens, torch.ones_like(tokens, dtype=torch.bool) if floating else mask, cache)

    model.__class__ = Adds


@bug("int-mask-read-otherwise", "a mask is inverted by 1 - mask where it is of integers, and read as if it were not",
     caught_by=(TYPES,), model=True)  # fmt: skip
def integers_inverted(model: Transformer) -> None:
    class Inverts(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            integers = mask is not None and mask.dtype == torch.int64
            return super().forward(tokens, 1 - mask if mask is not None and integers else mask, cache)

    model.__class__ = Inverts


@bug("first-read-into-a-cache-sees-one-more", "with a cache each position is shown one key more than it may see",
     caught_by=(CACHED,), model=True)  # fmt: skip
def cache_shows_one_more(model: Transformer) -> None:
    class OneMore(Transformer):
        cached = False

        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            self.cached = cache is not None
            return super().forward(tokens, mask, cache)

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            if mask is None and self.cached:
                return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T + 1)
            return super().visible(mask, T, S, device)

    model.__class__ = OneMore
