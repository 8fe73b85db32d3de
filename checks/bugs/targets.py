"""Further predictions trained on wrong targets: heads that look more than one token ahead, labels shifted again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import Transformer
from ..check_targets import check_every_head_predicts_the_token_after_what_it_read
from . import bug
from .designs import changed
from .losses_in_forward import ReturnsItsLoss


class LooksFurther(ReturnsItsLoss):
    """A second prediction reads the next token as well (DeepSeek-AI 2024, section 2.2, without a block of its own)."""

    later = 1  # what its labels are shifted by, beyond those of the first

    def further(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """[B, T - 1, V]"""
        return self.head(hidden[:, :-1] + self.embedding(targets[:, :-1]))  # type: ignore[no-any-return]

    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Any, Any]:
        T = targets.shape[1]
        _, loss = super().taught(hidden, logits, targets)
        further = self.further(hidden, targets)
        labels = F.pad(targets[:, self.later :], (0, T), value=-100)[:, : further.shape[1]]
        return logits, loss + 0.3 * F.cross_entropy(further.transpose(1, 2), labels)


class LooksFromOnePlace(LooksFurther):
    """A second prediction from the same states (Gloeckle et al. 2024, without a block of its own)."""

    def further(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.head(hidden[:, :-1].flip(-1))  # type: ignore[no-any-return]


def _of(kind: type[ReturnsItsLoss]) -> Callable[..., SimpleNamespace]:
    def parts(**config: Any) -> SimpleNamespace:
        def change(model: Transformer) -> None:
            model.__class__ = kind

        made = changed(change, **config)
        made.loss, made.declares = None, {}
        return made

    return parts


further_token, further_from_one_place = _of(LooksFurther), _of(LooksFromOnePlace)


def _later(model: Transformer) -> None:
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"later": 2})


@bug(
    "the labels of a second head, which reads the next token, are shifted twice",
    check_every_head_predicts_the_token_after_what_it_read,
    of=further_token,
)
def labels_shifted_again(model: Transformer) -> None:
    _later(model)


@bug(
    "the labels of a second head, which reads what the first reads, are shifted twice: none predicts two ahead",
    check_every_head_predicts_the_token_after_what_it_read,
    of=further_from_one_place,
)
def second_head_skips_a_token(model: Transformer) -> None:
    _later(model)


@bug(
    "a second head is trained on the token that it reads",
    check_every_head_predicts_the_token_after_what_it_read,
    of=further_token,
)
def second_head_copies(model: Transformer) -> None:
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"later": 0})
