"""Wrong losses inside a model's forward: what it returns where it is handed targets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import Transformer
from ..check_loss import (
    check_a_place_is_trained_on_its_own_target,
    check_extreme_logits_stay_finite,
    check_ignored_targets_are_not_trained,
    check_loss_takes_what_the_model_gives,
    check_targets_give_a_loss,
    check_targets_leave_the_logits_as_they_are,
    check_the_loss_trains_what_makes_the_logits,
)
from . import bug
from .designs import TaughtTransformer, changed


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the targets that are not -100, right."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)).transpose(1, 2), targets)


class ReturnsItsLoss(TaughtTransformer):
    """Handed targets, it gives logits and their loss, else the logits."""

    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
        return logits, cross_entropy(logits, targets)


def returning_its_loss(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = ReturnsItsLoss

    parts = changed(change, **config)
    parts.loss, parts.declares = None, {}
    return parts


@bug("given targets, the model returns flattened logits as its loss", check_targets_give_a_loss, of=returning_its_loss)
def loss_never_computed(model: Transformer) -> None:
    class Uncomputed(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, logits.flatten(0, 1)

    model.__class__ = Uncomputed


@bug("given targets, the model returns its loss function, uncalled", check_targets_give_a_loss, of=returning_its_loss)
def loss_is_a_function(model: Transformer) -> None:
    class Uncalled(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, F.cross_entropy

    model.__class__ = Uncalled


@bug("given targets, the model skips its head", check_targets_leave_the_logits_as_they_are, of=returning_its_loss)
def loss_of_hidden_states(model: Transformer) -> None:
    class Headless(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return super().taught(hidden, hidden, targets)

    model.__class__ = Headless


@bug("given targets, the final norm lacks its bias", check_targets_leave_the_logits_as_they_are, of=returning_its_loss)
def loss_of_other_logits(model: Transformer) -> None:
    class Unnormed(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return super().taught(hidden, self.head(hidden - self.norm.bias), targets)

    model.__class__ = Unnormed


@bug(
    "the model's loss is computed from hidden states instead of logits: the head is never trained",
    check_the_loss_trains_what_makes_the_logits,
    of=returning_its_loss,
    tied=False,
)
def loss_beside_the_head(model: Transformer) -> None:
    class Beside(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, cross_entropy(hidden, targets)

    model.__class__ = Beside


# -- the cross entropy, and what it ignores


def own_loss(value: Any) -> Any:
    """Damages a model so that `value(logits, targets)` is its loss."""

    class Own(ReturnsItsLoss):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
            return logits, value(logits, targets)

    return Own


@bug(
    "forward passes logits to nll_loss, which expects log-probabilities",
    check_loss_takes_what_the_model_gives,
    of=returning_its_loss,
)
def nll_of_raw_logits_in_forward(model: Transformer) -> None:
    model.__class__ = own_loss(lambda logits, targets: F.nll_loss(logits.transpose(1, 2), targets))


@bug(
    "forward takes log(softmax(x)): the softmax underflows to 0 and its logarithm is infinite",
    check_extreme_logits_stay_finite,
    of=returning_its_loss,
)
def naive_log_of_softmax_in_forward(model: Transformer) -> None:
    model.__class__ = own_loss(lambda logits, targets: F.nll_loss(logits.softmax(-1).log().transpose(1, 2), targets))


@bug(
    "forward returns the entropy of its prediction as the loss: no target enters it",
    check_a_place_is_trained_on_its_own_target,
    of=returning_its_loss,
)
def loss_without_targets_in_forward(model: Transformer) -> None:
    model.__class__ = own_loss(lambda logits, targets: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean())


@bug(
    "label -100 is clamped to token 0 and trained as that token",
    check_ignored_targets_are_not_trained,
    of=returning_its_loss,
)
def ignored_label_clamped(model: Transformer) -> None:
    model.__class__ = own_loss(lambda logits, targets: cross_entropy(logits, targets.clamp(min=0)))


@bug(
    "label smoothing written by hand also smooths at ignored labels, so padding is trained",
    check_ignored_targets_are_not_trained,
)
def smoothing_trains_ignored_labels(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return 0.9 * F.nll_loss(log_p.transpose(1, 2), targets) - 0.1 * log_p.mean(-1).mean()

    parts.loss, parts.declares = loss, {}


@bug("the loss takes an ignore_index and never uses it", check_ignored_targets_are_not_trained)
def ignore_index_unused(parts: SimpleNamespace) -> None:
    def loss(logits: Tensor, targets: Tensor, ignore_index: int = 0) -> Tensor:
        return cross_entropy(logits, targets)

    parts.loss, parts.declares = loss, {}


@bug(
    "a PreTrainedModel does not shift its labels, though its trainers pass labels = input_ids",
    check_a_place_is_trained_on_its_own_target,
    of=returning_its_loss,
    source="https://github.com/huggingface/transformers/issues/27517",
)
def labels_of_transformers_unshifted(model: Transformer) -> None:
    class PreTrainedModel(ReturnsItsLoss):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Any:
            return super().forward(input_ids, attention_mask, None, labels)

    model.__class__ = PreTrainedModel
