"""What a rule presupposes of a model; where it does not hold, the rule does not apply."""

from __future__ import annotations

from ..expect import NotApplicable
from ..subject import Subject


def expect_causal(subject: Subject) -> None:
    if not subject.causal:
        raise NotApplicable("declared as not causal")


def expect_takes_mask(subject: Subject) -> None:
    if not subject.takes_mask:
        raise NotApplicable("the subject takes no padding mask")
