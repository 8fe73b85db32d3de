"""What a rule requires of a model in order to apply."""

from __future__ import annotations

from ..expect import NotApplicable
from ..subject import Subject


def expect_causal(subject: Subject) -> None:
    if not subject.causal:
        raise NotApplicable("declared as not causal")


def expect_takes_mask(subject: Subject) -> None:
    if not subject.takes_mask:
        raise NotApplicable("the model takes no padding mask")
