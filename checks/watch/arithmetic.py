"""The operations that PyTorch ran, with the shapes of their tensors: whether two calls did the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .dispatch import Dispatch

# After these, equal shapes need not mean equal rounding: tokens are routed by value, or scaled by a maximum.
ROUTING = {"topk", "sort", "argsort", "nonzero", "argmax", "max", "amax", "aminmax", "multinomial", "bincount"}
DRAWS = ("dropout", "bernoulli", "rand", "normal", "uniform", "exponential", "multinomial")

Operation = tuple[Any, ...]  # its name, then the shapes of the tensors among its arguments


class Operations(Dispatch):
    """Records the operations that run and the shapes of the tensors they take."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append((str(func), *(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))))
        return func(*args, **(kwargs or {}))


def operations_of(run: Callable[[], Any]) -> list[Operation]:
    operations = Operations()
    with operations:
        run()
    return operations.log


def same_arithmetic(run: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether two calls ran the same operations on the same shapes, none of which routes by value.

    A mixture of experts multiplies as many tokens as chose an expert: another token's choice changes the rounding.
    """
    one, other = operations_of(run), operations_of(again)
    names = {name.split(".")[1] for name, *_ in one}
    return one == other and not names & ROUTING and not any("fft" in name for name in names)


def same_draws(run: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether two calls drew random numbers of the same shapes in the same order: from one seed, the same noise.

    In a mixture of experts, dropout draws one number per token that chose the expert: if another token chooses
    differently, all later noise differs.
    """
    one, other = (
        [entry for entry in operations_of(each) if any(word in entry[0] for word in DRAWS)] for each in (run, again)
    )
    return one == other
