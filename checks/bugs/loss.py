"""Mistakes in the loss: each replaces the reference's `loss(logits, targets, mask)` by one that is wrong in one way."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.loss import next_token_loss
from ...transformer.model import Transformer
from . import bug
from .designs import TaughtTransformer, changed

PLACE = "check_loss.check_a_place_is_trained_on_its_own_target"
DROPPED = "check_loss.check_no_target_is_dropped"
MASK = "check_loss.check_mask_drops_its_targets_and_no_others"
SYMBOL = "check_loss.check_every_symbol_counts_as_target"
VALUE = "check_loss.check_value_is_the_closed_form"
GRADIENT = "check_loss.check_gradient_is_the_closed_form"
PADDING = "check_loss.check_padding_changes_nothing"
TWICE = "check_loss.check_a_batch_given_twice_counts_as_declared"
KNOWN = "check_loss.check_known_logits_give_known_losses"
EXTREME = "check_loss.check_extreme_logits_stay_finite"
MASKED_LOGITS = "check_loss.check_masked_logits_may_be_anything"
NOTHING = "check_loss.check_nothing_to_learn_is_no_loss"
LOW = "check_loss.check_low_precision_logits_keep_the_loss"
PURE = "check_loss.check_loss_leaves_its_inputs_alone"
GIVES = "check_loss.check_targets_give_a_loss"
SAME_LOGITS = "check_loss.check_targets_leave_the_logits_as_they_are"
TRAINS = "check_loss.check_the_loss_trains_what_makes_the_logits"
TAKES = "check_loss.check_loss_takes_what_the_model_gives"


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T], right."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(x.transpose(1, 2), targets, reduction="none")


def kept(targets: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(targets, dtype=torch.bool) if mask is None else mask


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Right: what is masked is cut off, and nothing divided by 0."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


@bug(
    "label-shift-missing",
    "the logits at t are trained on the token just read, not on the next",
    caught_by=(PLACE,),
    source="https://github.com/huggingface/transformers/issues/27517",
)
def label_shift_missing(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits[:, 1:], targets[:, :-1], kept(targets, mask)[:, :-1])

    parts.loss = loss


@bug("label-shifted-twice", "targets that the data has shifted are shifted again inside the loss", caught_by=(PLACE,))
def label_shifted_twice(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits[:, :-1], targets[:, 1:], kept(targets, mask)[:, 1:])

    parts.loss = loss


@bug(
    "flatten-then-shift",
    "the shift comes after view(-1): the end of a row predicts the start of the next",
    caught_by=(PLACE,),
    source="https://github.com/huggingface/transformers/issues/47394",
)
def flatten_then_shift(parts: SimpleNamespace) -> None:
    parts.declares = {**parts.declares, "shift": 1}

    def loss(logits, targets, mask=None):
        flat, labels, keep = logits.flatten(0, 1)[:-1], targets.flatten()[1:], kept(targets, mask).flatten()[1:]
        return next_token_loss(flat[None], labels[None], keep[None])

    parts.loss = loss


@bug(
    "logits-labels-reshape-order",
    "logits are flattened time first, labels batch first: rows are paired with each other's targets",
    caught_by=(PLACE,),
)
def logits_labels_reshape_order(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits.transpose(0, 1).reshape(logits.shape), targets, mask)

    parts.loss = loss


@bug("last-target-dropped", "[:-1] cuts the last target of every row", caught_by=(DROPPED, MASK))
def last_target_dropped(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits[:, :-1], targets[:, :-1], kept(targets, mask)[:, :-1])

    parts.loss = loss


@bug(
    "loss-mask-shifted-by-one",
    "the mask of the inputs is applied to the targets, one place off",
    caught_by=(MASK, VALUE),
    source="https://github.com/verl-project/verl/issues/3562",
)
def loss_mask_shifted_by_one(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        return next_token_loss(logits, targets, torch.cat((mask[:, :1], mask[:, :-1]), 1))

    parts.loss = loss


@bug(
    "loss-mask-ignored",
    "the cross entropy is a scalar before the mask is multiplied in: every target is trained",
    caught_by=(MASK, VALUE, GRADIENT, "check_sanity.check_learns_only_unmasked_targets"),
    source="https://github.com/jingyaogong/minimind/issues/51",
)
def loss_mask_ignored(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        return (losses(logits, targets).mean() * mask).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug(
    "loss-mask-inverted",
    "what the mask keeps is dropped and what it drops is trained",
    caught_by=(MASK, VALUE),
    source="https://github.com/lucidrains/voicebox-pytorch/issues/6",
)
def loss_mask_inverted(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits, targets, None if mask is None else ~mask)

    parts.loss = loss


@bug(
    "masked-mean-over-all-positions",
    "(losses * mask).mean() divides by the masked places too",
    caught_by=(VALUE, PADDING),
    source="https://github.com/d2l-ai/d2l-en/issues/2076",
)
def masked_mean_over_all_positions(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return torch.where(kept(targets, mask), losses(logits, targets), 0.0).mean()

    parts.loss = loss


@bug(
    "masked-numerator-unmasked",
    "losses.sum() / mask.sum(): masked targets are trained all the same",
    caught_by=(MASK, VALUE, GRADIENT),
    source="https://github.com/alibaba/ROLL/pull/444",
)
def masked_numerator_unmasked(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return losses(logits, targets).sum() / kept(targets, mask).sum().clamp(min=1)

    parts.loss = loss


@bug("loss-mean-of-sequence-means", "the mean of each row, then the mean of rows: short rows weigh more",
     caught_by=(VALUE, GRADIENT))  # fmt: skip
def loss_mean_of_sequence_means(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        return (torch.where(mask, losses(logits, targets), 0.0).sum(1) / mask.sum(1).clamp(min=1)).mean()

    parts.loss = loss


@bug("loss-divided-by-one-less", "the sum is divided by the number of targets less one", caught_by=(VALUE, TWICE))
def loss_divided_by_one_less(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        return torch.where(mask, losses(logits, targets), 0.0).sum() / (mask.sum() - 1).clamp(min=1)

    parts.loss = loss


@bug(
    "ignore-index-mismatch",
    "masked targets become -1, which the loss takes for the last symbol",
    caught_by=(MASK, VALUE, GRADIENT),
    source="https://github.com/huggingface/transformers/issues/2759",
)
def ignore_index_mismatch(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        labels = targets.masked_fill(~kept(targets, mask), -1)
        return losses(logits, labels % logits.shape[-1]).mean()  # as Python's own indexing does

    parts.loss = loss


@bug(
    "pad-id-collides-with-real-token",
    "ignore_index is 0, and 0 is a token like any other",
    caught_by=(SYMBOL,),
    source="https://github.com/lucidrains/DALLE-pytorch/issues/57",
)
def pad_id_collides_with_real_token(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits, targets, kept(targets, mask) & (targets != 0))

    parts.loss = loss


@bug(
    "naive-log-of-softmax",
    "log(softmax(x)): the softmax underflows to 0 and its logarithm is infinite",
    caught_by=(EXTREME,),
    source="https://github.com/huggingface/sentence-transformers/pull/3800",
)
def naive_log_of_softmax(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = x.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        mask = kept(targets, mask)
        return mean(-torch.where(mask, p, 1.0).log(), mask)

    parts.loss = loss


@bug(
    "log-plus-eps", "log(p + 1e-4) bounds the loss and bends its gradient", caught_by=(VALUE, GRADIENT, EXTREME, KNOWN)
)
def log_plus_eps(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        p = x.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return mean(-(p + 1e-4).log(), kept(targets, mask))

    parts.loss = loss


@bug(
    "loss-in-bf16",
    "the cross entropy is computed on bfloat16 logits",
    caught_by=(VALUE, LOW),
    source="https://github.com/Modalities/modalities/pull/464",
)
def loss_in_bf16(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        p = logits.bfloat16().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return -torch.where(mask, p, 0.0).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug("nan-times-zero-mask", "losses * mask: NaN where masked times 0 is NaN", caught_by=(MASKED_LOGITS,))
def nan_times_zero_mask(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        return (losses(logits, targets) * mask).sum() / mask.sum().clamp(min=1)

    parts.loss = loss


@bug(
    "all-masked-batch-nan",
    "a batch without a target divides 0 by 0",
    caught_by=(NOTHING,),
    source="https://github.com/meta-pytorch/torchtune/issues/2341",
)
def all_masked_batch_nan(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        mask = kept(targets, mask)
        x = logits.masked_fill(~mask[..., None], 0.0)
        return torch.where(mask, losses(x, targets), 0.0).sum() / mask.sum()

    parts.loss = loss


@bug("masked-logits-zeroed", "logits * mask, then the mean of all: every masked place adds ln V",
     caught_by=(VALUE, PADDING))  # fmt: skip
def masked_logits_zeroed(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return losses(logits.masked_fill(~kept(targets, mask)[..., None], 0.0), targets).mean()

    parts.loss = loss


@bug(
    "labels-alias-input-ids",
    "labels are the input ids themselves, and -100 is written into them",
    caught_by=(PURE,),
    source="https://github.com/ServiceNow/Fast-LLM/pull/253",
)
def labels_alias_input_ids(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        right = next_token_loss(logits, targets, mask)
        if mask is not None:
            targets[~mask] = -100
        return right

    parts.loss = loss


@bug("softmax-twice", "softmax, then a cross entropy that makes the softmax itself", caught_by=(VALUE, KNOWN))
def softmax_twice(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits.softmax(-1), targets, mask)


@bug("nll-of-raw-logits", "nll_loss of logits that never went through log_softmax", caught_by=(TAKES,))
def nll_of_raw_logits(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return mean(-logits.gather(-1, targets[..., None]).squeeze(-1), kept(targets, mask))

    parts.loss = loss


@bug("loss-softmax-over-positions", "the softmax runs over positions, not over symbols", caught_by=(VALUE,))
def loss_softmax_over_positions(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return mean(-logits.log_softmax(1).gather(-1, targets[..., None]).squeeze(-1), kept(targets, mask))

    parts.loss = loss


@bug("loss-in-bits", "log2: the loss and every gradient are 1.44 times too large", caught_by=(VALUE, GRADIENT, KNOWN))
def loss_in_bits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, targets, mask) / math.log(2)


@bug("loss-of-scaled-logits", "a temperature is left in the loss: it trains logits / 2", caught_by=(VALUE,))
def loss_of_scaled_logits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits / 2, targets, mask)


@bug("loss-of-other-ids", "labels - 1: every target trains the id before it", caught_by=(PLACE,))
def loss_of_other_ids(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, (targets - 1).clamp(min=0), mask)


@bug("loss-mask-of-row-0", "mask[0] is broadcast to the whole batch", caught_by=(MASK,))
def loss_mask_of_row_0(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        return next_token_loss(logits, targets, None if mask is None else mask[:1].expand_as(mask))

    parts.loss = loss


@bug("loss-detached", "the loss is turned into a number before backward can reach it", caught_by=(PLACE,))
def loss_detached(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: next_token_loss(logits, targets, mask).detach()


@bug("labels-smoothed", "a tenth of the probability goes to wrong symbols, which nobody asked for",
     caught_by=(VALUE,))  # fmt: skip
def labels_smoothed(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        values = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=0.1)
        return mean(values, kept(targets, mask))

    parts.loss = loss


@bug("loss-negated", "the log-probabilities of the targets are averaged and not negated", caught_by=(PLACE,))
def loss_negated(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: -next_token_loss(logits, targets, mask)


@bug("loss-without-targets", "the loss is the entropy of what is predicted: no target enters it", caught_by=(PLACE,))
def loss_without_targets(parts: SimpleNamespace) -> None:
    def loss(logits, targets, mask=None):
        chance = logits.softmax(-1)
        return mean(-(chance * logits.log_softmax(-1)).sum(-1), kept(targets, mask))

    parts.loss = loss


@bug("loss-returns-logits", "the loss gives back the logits, and no number", caught_by=(PLACE,))
def loss_returns_logits(parts: SimpleNamespace) -> None:
    parts.loss = lambda logits, targets, mask=None: logits.flatten(0, 1)


# -- the loss that a model returns


class ReturnsItsLoss(TaughtTransformer):
    """Handed targets, it gives logits and their loss, else the logits."""

    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
        return logits, losses(logits, targets).mean()


def returning_its_loss(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = ReturnsItsLoss

    parts = changed(change, **config)
    parts.loss, parts.declares = None, {}
    return parts


@bug("loss-never-computed", "handed targets, the model gives flattened logits where its loss should be",
     caught_by=(GIVES,), model=True, of=returning_its_loss)  # fmt: skip
def loss_never_computed(model: Transformer) -> None:
    class Uncomputed(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, logits.flatten(0, 1)

    model.__class__ = Uncomputed


@bug("loss-is-a-function", "handed targets, the model gives a function where its loss should be: it is never called",
     caught_by=(GIVES,), model=True, of=returning_its_loss)  # fmt: skip
def loss_is_a_function(model: Transformer) -> None:
    class Uncalled(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, F.cross_entropy

    model.__class__ = Uncalled


@bug("loss-of-hidden-states", "handed targets, the model leaves its head out: logits and loss are of hidden states",
     caught_by=(SAME_LOGITS,), model=True, of=returning_its_loss)  # fmt: skip
def loss_of_hidden_states(model: Transformer) -> None:
    class Headless(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return super().taught(hidden, hidden, targets)

    model.__class__ = Headless


@bug("loss-of-other-logits", "the logits that come with the loss left the last norm out",
     caught_by=(SAME_LOGITS,), model=True, of=returning_its_loss)  # fmt: skip
def loss_of_other_logits(model: Transformer) -> None:
    class Unnormed(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return super().taught(hidden, self.head(hidden - self.norm.bias), targets)

    model.__class__ = Unnormed


@bug("loss-beside-the-head", "the logits are right, and the loss is one of hidden states: nothing trains the head",
     caught_by=(TRAINS,), model=True, of=returning_its_loss, tied=False)  # fmt: skip
def loss_beside_the_head(model: Transformer) -> None:
    class Beside(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, losses(hidden, targets).mean()

    model.__class__ = Beside
