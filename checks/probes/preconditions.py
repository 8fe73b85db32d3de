"""What a rule requires of a model in order to apply."""

from __future__ import annotations

from ..expect import NotApplicable
from ..subject import Subject


def expect_causal(subject: Subject) -> None:
    if not subject.causal:
        raise NotApplicable("declared as not causal")


def expect_takes_mask(subject: Subject) -> None:
    if not subject.takes_mask:
        raise NotApplicable("the model takes no padding mask", unless="forward has a parameter such as attention_mask")


def expect_trainable(subject: Subject) -> None:
    """For hundreds of training steps: a model that can be built small, or is not large."""
    if subject.large:
        raise NotApplicable(
            f"the model has {subject.parameters:,} parameters: hundreds of training steps would take minutes. Give its "
            "class, or a function build_model(n_embd, n_layer, …), and a small one is built and trained instead",
            parameters=subject.parameters,
        )
