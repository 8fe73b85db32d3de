"""A backward pass of a subject's, where it can have one after another."""

from __future__ import annotations

from torch import Tensor, nn

from ..expect import NotApplicable

KEPT = ("backward through the graph a second time", "modified by an inplace operation")  # says autograd
SAYS = "the model keeps what an earlier call computed, and a step reaches back into it: it is not made to train"


def needs_no_cache_inside(model: nn.Module) -> None:
    """Raises NotApplicable where a module holds a tensor with its history: a cache that every call writes to."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                raise NotApplicable(SAYS)


def backward(loss: Tensor) -> None:
    """Raises NotApplicable where a step reaches back into an earlier one, as over a cache that decoding fills."""
    try:
        loss.backward()
    except RuntimeError as error:
        if not any(words in str(error) for words in KEPT):
            raise
        raise NotApplicable(SAYS, error=str(error).splitlines()[0][:200]) from None
