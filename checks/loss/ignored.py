"""Targets that a loss is to ignore, by its mask or by labels that are no token's: what it does at their positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..expect import advise, fail
from ..subject import Subject
from . import cases
from .forms import IGNORED, role_of
from .met_loss import MetLoss
from .reading import EXACT, gradient

ONE_TOKEN = 0.4  # of a gradient's absolute sum that its target has at least; it is half for a cross entropy


@dataclass(frozen=True)
class Ignored:
    """The gradient of the logits where the targets were to be ignored."""

    label: int | None  # None: they were masked as the loss masks
    why: str  # "ignore_index=0 by default"; empty: the label is no token id
    left: Tensor  # [places, V], where ignored
    kept: Tensor  # [places, V], of the other targets

    @property
    def share(self) -> float:
        """How large the largest gradient of an ignored target is, relative to that of the others."""
        return float(self.left.abs().max() / self.kept.abs().max())

    @property
    def trained(self) -> int | None:
        """The token id that all ignored targets train; None if they train no token in particular."""
        targets = self.left.argmin(-1)
        pulled = -self.left.amin(-1) >= ONE_TOKEN * self.left.abs().sum(-1)
        return int(targets[0]) if bool(pulled.all()) and bool((targets == targets[0]).all()) else None


def ignored(subject: Subject, loss: MetLoss) -> Iterator[Ignored]:
    """Each way to have targets ignored that the loss accepts: its mask, else -100 and -1, and its own default.

    Raises what the loss raises for the last label that it does not accept.
    """
    logits, targets = cases.sample(loss, rows=2, places=loss.places)
    keep = cases.masks(loss.places)[1]
    counted = cases.all_kept(loss, keep) if loss.masks else keep.clone()
    counted[:, list(loss.dropped)] = False
    refused: Exception | None = None
    found = False
    for label, why in [*([(None, "")] if loss.masks else [(i, "") for i in IGNORED]), *defaults(subject)]:
        try:
            if label is None:
                grad = gradient(loss, logits, targets, keep)
            else:
                grad = gradient(loss.call, logits, targets.masked_fill(~keep, label), None)
        except Exception as error:
            refused = error
            continue
        one = Ignored(label, why, grad[~keep], grad[counted])
        if label is not None and label < 0 and one.trained == loss.V + label:
            continue  # an index from the end: nobody said that it is ignored
        found = True
        yield one
    if not found and refused is not None:
        raise refused


def refuse_trained(one: Ignored, loss: MetLoss) -> None:
    """Fails if ignored targets have a gradient; only remarks on it where the loss is more than a cross entropy."""
    if not one.left.any():
        return
    what = "a masked target" if one.label is None else f"a target of {one.label} ({one.why or 'no token id'})"
    whom = "" if one.trained is None else f", as if it were token id {one.trained}"
    says = f"{what} is trained{whom}: its gradient is {one.share:.3g} times that of a real target, should be 0"
    if loss.reading is None or loss.reading.error > EXACT:
        advise(f"{says}; the checks cannot tell whether the loss is meant to reach padding")
        return
    fail(
        says,
        likely=("ignored-label-clamped", "smoothing-trains-ignored-labels", "ignore-index-unused")
        if one.label is not None
        else ("loss-mask-ignored",),
        advice="multiply every term of the loss by labels != -100 before the sum, or use F.cross_entropy with "
        "ignore_index",
        label=one.label,
    )


def defaults(subject: Subject) -> list[tuple[int, str]]:
    """The label that the subject's own loss takes to be ignored, where it has a default."""
    taken = [p for p in parameters(subject.part("loss")) if role_of(p.name.lower(), []) == "ignore"]
    return [(p.default, f"{p.name}={p.default} by default") for p in taken if type(p.default) is int]


def parameters(function: Any) -> list[inspect.Parameter]:
    called = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        return list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return []
