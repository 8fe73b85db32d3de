"""What a rule presupposes of a model; where it does not hold, the rule does not apply."""

from __future__ import annotations

from typing import Any

from ..expect import NotApplicable


def expect_causal(subject: Any) -> None:
    if not subject.causal:
        raise NotApplicable("declared as not causal")


def expect_takes_mask(subject: Any) -> None:
    if not subject.takes_mask:
        raise NotApplicable("the subject takes no padding mask")
