"""Wrong losses: which target, the loss mask, the mean and the cross entropy."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.loss import next_token_loss
from ..check_loss import (
    check_a_batch_given_twice_counts_as_declared,
    check_a_place_is_trained_on_its_own_target,
    check_every_symbol_counts_as_target,
    check_extreme_logits_stay_finite,
    check_gradient_is_the_closed_form,
    check_known_logits_give_known_losses,
    check_loss_leaves_its_inputs_alone,
    check_loss_takes_what_the_model_gives,
    check_low_precision_logits_keep_the_loss,
    check_mask_drops_its_targets_and_no_others,
    check_masked_logits_may_be_anything,
    check_no_target_is_dropped,
    check_nothing_to_learn_is_no_loss,
    check_padding_changes_nothing,
    check_value_is_the_closed_form,
)
from ..check_sanity import check_learns_only_unmasked_targets
from . import bug


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T], right."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(x.transpose(1, 2), targets, reduction="none")


def kept(targets: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if mask is None else mask


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Right: what is masked is cut off, and nothing divided by 0."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


# -- which target


@bug(
    "targets are not shifted: the logits at t are trained on the token just read",
    check_a_place_is_trained_on_its_own_target,
    source="https://github.com/huggingface/transformers/issues/27517",
)
def label_shift_missing(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits[:, 1:], targets[:, :-1], kept(targets, mask)[:, :-1])

    parts.loss = loss


@bug("targets are shifted twice: in the data and again in the loss", check_a_place_is_trained_on_its_own_target)
def label_shifted_twice(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits[:, :-1], targets[:, 1:], kept(targets, mask)[:, 1:])

    parts.loss = loss


@bug(
    "targets are shifted after view(-1): the end of a row predicts the start of the next",
    check_a_place_is_trained_on_its_own_target,
    source="https://github.com/huggingface/transformers/issues/47394",
)
def flatten_then_shift(parts: SimpleNamespace) -> None:
    parts.declares = {**parts.declares, "shift": 1}

    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        flat, labels, keep = logits.flatten(0, 1)[:-1], targets.flatten()[1:], kept(targets, mask).flatten()[1:]
        return next_token_loss(flat[None], labels[None], keep[None])

    parts.loss = loss


@bug("logits are flattened time first, targets batch first", check_a_place_is_trained_on_its_own_target)
def logits_labels_reshape_order(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits.transpose(0, 1).reshape(logits.shape), targets, mask)

    parts.loss = loss


@bug("[:-1] drops the last target of every row", check_no_target_is_dropped, check_mask_drops_its_targets_and_no_others)
def last_target_dropped(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits[:, :-1], targets[:, :-1], kept(targets, mask)[:, :-1])

    parts.loss = loss


@bug("every target is off by one id: labels - 1", check_a_place_is_trained_on_its_own_target)
def loss_of_other_ids(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, (targets - 1).clamp(min=0), mask)


@bug("the loss is the entropy of the prediction: no target enters it", check_a_place_is_trained_on_its_own_target)
def loss_without_targets(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        chance = logits.softmax(-1)
        return mean(-(chance * logits.log_softmax(-1)).sum(-1), kept(targets, mask))

    parts.loss = loss


# -- the loss mask


@bug(
    "the loss mask is off by one: that of the inputs is applied to the targets",
    check_mask_drops_its_targets_and_no_others,
    check_value_is_the_closed_form,
    source="https://github.com/verl-project/verl/issues/3562",
)
def loss_mask_shifted_by_one(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        return next_token_loss(logits, targets, torch.cat((mask[:, :1], mask[:, :-1]), 1))

    parts.loss = loss


@bug(
    "the loss mask has no effect: the cross entropy is a scalar before it is applied",
    check_mask_drops_its_targets_and_no_others,
    check_value_is_the_closed_form,
    check_gradient_is_the_closed_form,
    check_learns_only_unmasked_targets,
    source="https://github.com/jingyaogong/minimind/issues/51",
)
def loss_mask_ignored(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        return (losses(logits, targets).mean() * mask).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug(
    "the loss mask is inverted: what it should drop is trained, and nothing else",
    check_mask_drops_its_targets_and_no_others,
    check_value_is_the_closed_form,
    source="https://github.com/lucidrains/voicebox-pytorch/issues/6",
)
def loss_mask_inverted(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits, targets, None if mask is None else ~mask)

    parts.loss = loss


@bug("the loss mask of row 0 is applied to the whole batch", check_mask_drops_its_targets_and_no_others)
def loss_mask_of_row_0(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits, targets, None if mask is None else mask[:1].expand_as(mask))

    parts.loss = loss


@bug(
    "losses.sum() / mask.sum(): masked targets are trained all the same",
    check_mask_drops_its_targets_and_no_others,
    check_value_is_the_closed_form,
    check_gradient_is_the_closed_form,
    source="https://github.com/alibaba/ROLL/pull/444",
)
def masked_numerator_unmasked(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return losses(logits, targets).sum() / kept(targets, mask).sum().clamp(min=1)

    parts.loss = loss


@bug("masked logits become 0 and count in the mean", check_value_is_the_closed_form, check_padding_changes_nothing)
def masked_logits_zeroed(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return losses(logits.masked_fill(~kept(targets, mask)[..., None], 0.0), targets).mean()

    parts.loss = loss


@bug("losses are multiplied by the mask: NaN times 0 is NaN", check_masked_logits_may_be_anything)
def nan_times_zero_mask(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        return (losses(logits, targets) * mask).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug(
    "masked targets are set to -1, which the loss reads as the last token id",
    check_mask_drops_its_targets_and_no_others,
    check_value_is_the_closed_form,
    check_gradient_is_the_closed_form,
    source="https://github.com/huggingface/transformers/issues/2759",
)
def ignore_index_mismatch(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        labels = targets.masked_fill(~kept(targets, mask), -1)
        return losses(logits, labels % logits.shape[-1]).mean()  # as Python's own indexing does

    parts.loss = loss


@bug(
    "ignore_index is 0, the id of a real token: that token is never trained",
    check_every_symbol_counts_as_target,
    source="https://github.com/lucidrains/DALLE-pytorch/issues/57",
)
def pad_id_collides_with_real_token(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return next_token_loss(logits, targets, kept(targets, mask) & (targets != 0))

    parts.loss = loss


@bug(
    "-100 is written into the caller's targets in place",
    check_loss_leaves_its_inputs_alone,
    source="https://github.com/ServiceNow/Fast-LLM/pull/253",
)
def labels_alias_input_ids(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        right = next_token_loss(logits, targets, mask)
        if mask is not None:
            targets[~mask] = -100
        return right

    parts.loss = loss


# -- the mean


@bug(
    "(losses * mask).mean() divides by masked positions too",
    check_value_is_the_closed_form,
    check_padding_changes_nothing,
    source="https://github.com/d2l-ai/d2l-en/issues/2076",
)
def masked_mean_over_all_positions(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.where(kept(targets, mask), losses(logits, targets), 0.0).mean()

    parts.loss = loss


@bug("the loss is the mean of each row's mean", check_value_is_the_closed_form, check_gradient_is_the_closed_form)
def loss_mean_of_sequence_means(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        return (torch.where(mask, losses(logits, targets), 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()

    parts.loss = loss


@bug(
    "the sum is divided by the number of targets minus one",
    check_value_is_the_closed_form,
    check_a_batch_given_twice_counts_as_declared,
)
def loss_divided_by_one_less(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        return torch.where(mask, losses(logits, targets), 0.0).sum() / (mask.sum() - 1).clamp(min=1)

    parts.loss = loss


@bug(
    "a batch without targets divides 0 by 0",
    check_nothing_to_learn_is_no_loss,
    source="https://github.com/meta-pytorch/torchtune/issues/2341",
)
def all_masked_batch_nan(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        x = logits.masked_fill(~mask[..., None], 0.0)
        return torch.where(mask, losses(x, targets), 0.0).sum() / mask.sum()

    parts.loss = loss


# -- the cross entropy


@bug(
    "log(softmax(x)): the softmax underflows to 0 and its logarithm is infinite",
    check_extreme_logits_stay_finite,
    source="https://github.com/huggingface/sentence-transformers/pull/3800",
)
def naive_log_of_softmax(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = x.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        mask = kept(targets, mask)
        return mean(-torch.where(mask, p, 1.0).log(), mask)

    parts.loss = loss


@bug(
    "log(p + 1e-4) instead of log(p): the loss is bounded and its gradient wrong",
    check_value_is_the_closed_form,
    check_gradient_is_the_closed_form,
    check_extreme_logits_stay_finite,
    check_known_logits_give_known_losses,
)
def log_plus_eps(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = x.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return mean(-(p + 1e-4).log(), kept(targets, mask))

    parts.loss = loss


@bug(
    "the cross entropy is computed in bfloat16",
    check_value_is_the_closed_form,
    check_low_precision_logits_keep_the_loss,
    source="https://github.com/Modalities/modalities/pull/464",
)
def loss_in_bf16(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = kept(targets, mask)
        p = logits.bfloat16().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return -torch.where(mask, p, 0.0).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug(
    "softmax twice: cross entropy applies it too", check_value_is_the_closed_form, check_known_logits_give_known_losses
)
def softmax_twice(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits.softmax(-1), targets, mask)


@bug("nll_loss is applied to logits without log_softmax", check_loss_takes_what_the_model_gives)
def nll_of_raw_logits(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return mean(-logits.gather(-1, targets[..., None]).squeeze(-1), kept(targets, mask))

    parts.loss = loss


@bug("the softmax runs over positions instead of the vocabulary", check_value_is_the_closed_form)
def loss_softmax_over_positions(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return mean(-logits.log_softmax(1).gather(-1, targets[..., None]).squeeze(-1), kept(targets, mask))

    parts.loss = loss


@bug("a temperature is left in the loss: it trains logits / 2", check_value_is_the_closed_form)
def loss_of_scaled_logits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits / 2, targets, mask)


@bug("undeclared label smoothing: a tenth of the probability goes to wrong tokens", check_value_is_the_closed_form)
def labels_smoothed(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        values = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=0.1)
        return mean(values, kept(targets, mask))

    parts.loss = loss


@bug(
    "log2 instead of log: the loss and every gradient are 1.44 times too large",
    check_value_is_the_closed_form,
    check_gradient_is_the_closed_form,
    check_known_logits_give_known_losses,
)
def loss_in_bits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, targets, mask) / math.log(2)


@bug("sign error: the log-probabilities of the targets are not negated", check_a_place_is_trained_on_its_own_target)
def loss_negated(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: -next_token_loss(logits, targets, mask)


@bug("the loss is detached: backward cannot reach the model", check_a_place_is_trained_on_its_own_target)
def loss_detached(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, targets, mask).detach()


@bug("the loss function returns the logits instead of a number", check_a_place_is_trained_on_its_own_target)
def loss_returns_logits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: logits.flatten(0, 1)
