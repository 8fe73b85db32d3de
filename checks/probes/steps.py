"""A backward pass of a subject's, where it can have one after another."""

from __future__ import annotations

from torch import Tensor

from checks.expect import NotApplicable

KEPT = ("backward through the graph a second time", "modified by an inplace operation")  # says autograd


def backward(loss: Tensor) -> None:
    """Raises NotApplicable where a step reaches back into an earlier one, as over a cache that decoding fills."""
    try:
        loss.backward()
    except RuntimeError as error:
        if not any(words in str(error) for words in KEPT):
            raise
        says = "the model keeps what an earlier call computed, and a step reaches back into it: it is not made to train"
        raise NotApplicable(says, error=str(error).splitlines()[0][:200]) from None
