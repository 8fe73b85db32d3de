"""One process or several: how a window of examples is shared out and how what each computes is put together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn


class SingleProcess:
    """Training in this process alone."""

    rank, count = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def share(self, examples: Sequence) -> Sequence:
        """This process's part of the examples."""
        return examples

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes."""
        return values

    def without_averaging(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of a backward pass in here stay with this process."""
        return nullcontext()
