"""Wrong masks of a batch: padding that is attended to, mask types that disagree, documents packed into one row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import KeyValueCache, Transformer, causal_mask
from ..check_causality import (
    check_future_cannot_change_past_under_a_mask,
    check_past_reaches_every_later_position,
)
from ..check_contract import check_logits_are_finite
from ..check_masking import (
    check_mask_of_ones_changes_nothing,
    check_mask_types_agree,
    check_packed_documents_stay_apart,
    check_pad_contents_change_nothing,
    check_rows_do_not_touch,
    check_rows_of_padding_do_no_harm,
)
from . import bug
from .designs import PackedTransformer, PartedTransformer, packed, parted

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


@bug("the padding mask is accepted and never used: padding is attended to", check_pad_contents_change_nothing)
def pad_mask_ignored(model: Transformer) -> None:
    class Ignored(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            return super().visible(None, T, S, device)

    model.__class__ = Ignored


@bug(
    "the padding mask is inverted: only padding is attended to",
    check_mask_of_ones_changes_nothing,
    check_pad_contents_change_nothing,
    source="https://github.com/InseeFrLab/torchTextClassifiers/pull/92 ; "
    "https://github.com/jadore801120/attention-is-all-you-need-pytorch/issues/148",
)
def bool_mask_semantics_inverted(model: Transformer) -> None:
    class Inverted(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            return ~mask[:, None, None, :]

    model.__class__ = Inverted


@bug(
    "the padding mask is applied to queries instead of keys: padding is attended to",
    check_pad_contents_change_nothing,
    source="https://github.com/vllm-project/vllm-omni/issues/5865 ; https://github.com/pytorch/pytorch/issues/41508",
)
def pad_mask_on_queries(model: Transformer) -> None:
    class OnQueries(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            return mask[:, None, -T:, None]

    model.__class__ = OnQueries


@bug("the padding mask replaces the causal mask: the future is visible", check_future_cannot_change_past_under_a_mask)
def pad_mask_replaces_causal(model: Transformer) -> None:
    class Replaced(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            both = super().visible(mask, T, S, device)
            return both if mask is None or both is None else mask[:, None, None, :].expand_as(both)

    model.__class__ = Replaced


@bug(
    "the padding mask is repeated over heads in the wrong order: rows get each other's masks",
    check_pad_contents_change_nothing,
    check_rows_do_not_touch,
    source="https://github.com/lsdefine/attention-is-all-you-need-keras/issues/36",
)
def mask_repeated_in_wrong_head_batch_order(model: Transformer) -> None:
    class Repeated(OtherMask):
        def padding(self, mask: Tensor, T: int, device: torch.device) -> Tensor:
            B, S = mask.shape
            return mask.repeat(self.config.n_head, 1).view(B, self.config.n_head, 1, S)

    model.__class__ = Repeated


@bug(
    "padding attends to nothing, not even itself: its softmax is NaN, and NaN spreads",
    check_rows_of_padding_do_no_harm,
    source="https://github.com/pytorch/pytorch/issues/41508 ; https://github.com/tracel-ai/burn/pull/4697",
    attention="explicit",
)
def fully_masked_row_nan(model: Transformer) -> None:
    class Nothing(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            if mask is None:
                return super().visible(mask, T, S, device)
            return causal_mask(T, S, device) & mask[:, None, None, :]

    model.__class__ = Nothing


@bug("token id 0 is taken for padding: first in a row, it sees nothing", check_logits_are_finite, attention="explicit")
def first_token_masked_out(model: Transformer) -> None:
    class TakesForPadding(Transformer):
        tokens: Tensor | None = None

        def embed(self, tokens: Tensor) -> Tensor:
            self.tokens = tokens
            return super().embed(tokens)

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            assert self.tokens is not None
            seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
            return seen & (self.tokens != 0)[:, None, None, :]

    model.__class__ = TakesForPadding


@bug("a running mean over past tokens includes left padding", check_pad_contents_change_nothing)
def pads_counted_in_a_mean(model: Transformer) -> None:
    class Counts(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]

    model.__class__ = Counts


# -- mask types


@bug("a float mask of 0 and 1 masks nothing out; a boolean mask is right", check_mask_types_agree, attention="explicit")
def float_mask_added(model: Transformer) -> None:
    class Adds(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            floating = mask is not None and mask.is_floating_point()
            return super().forward(tokens, torch.ones_like(tokens, dtype=torch.bool) if floating else mask, cache)

    model.__class__ = Adds


@bug("an integer mask is inverted (1 - mask); a boolean mask is right", check_mask_types_agree)
def int_mask_read_otherwise(model: Transformer) -> None:
    class Inverts(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            integers = mask is not None and mask.dtype == torch.int64
            return super().forward(tokens, 1 - mask if mask is not None and integers else mask, cache)

    model.__class__ = Inverts


# -- documents packed into one row


@bug(
    "documents packed into one row attend to each other",
    check_packed_documents_stay_apart,
    source="https://github.com/huggingface/transformers/pull/46634 ; https://github.com/huggingface/trl/issues/784",
    of=packed,
)
def packing_cross_contamination(model: Transformer) -> None:
    class Contaminated(PackedTransformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            return Transformer.visible(self, mask, T, S, device)

    model.__class__ = Contaminated


@bug(
    "positions continue from one packed document to the next instead of restarting",
    check_packed_documents_stay_apart,
    source="https://github.com/huggingface/nanoVLM/pull/204",
    of=packed,
)
def packing_positions_not_reset(model: Transformer) -> None:
    class RunOn(PackedTransformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return Transformer.token_positions(self, mask, T, S, device)

    model.__class__ = RunOn


@bug(
    "an end token is counted to the next document: it sees nothing of the one that it ends",
    check_past_reaches_every_later_position,
    of=parted,
)
def end_token_in_next_document(model: Transformer) -> None:
    class Early(PartedTransformer):
        def counted(self, ends: Tensor) -> Tensor:
            return ends.cumsum(dim=1)

    model.__class__ = Early
