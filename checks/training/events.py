"""What a train_step calls, in order: backward, optimizer.step and scheduler.step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn


@dataclass
class Events:
    """The names of the calls, and the gradients at each optimizer step."""

    names: list[str] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return " → ".join(self.names)


class Ticks(torch.optim.lr_scheduler.LambdaLR):
    """A constant schedule that records when it is stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer, events: Events) -> None:
        self.events = Events()
        super().__init__(optimizer, lambda _: 1.0)
        self.events = events  # not the step that the constructor makes itself

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.events.names.append("scheduler.step")
        super().step(*args, **kwargs)


@contextmanager
def watched_events(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Events]:
    """Records the calls of this optimizer and of Tensor.backward inside the block."""
    events = Events()
    backward: Any = torch.Tensor.backward

    def stepped(*_: Any) -> None:
        events.names.append("optimizer.step")
        given = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        events.gradients.append(torch.cat(given).clone() if given else torch.zeros(0))

    def backed(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.names.append("backward")
        return backward(tensor, *args, **kwargs)

    hook = optimizer.register_step_pre_hook(stepped)
    try:
        with patch.object(torch.Tensor, "backward", backed):
            yield events
    finally:
        hook.remove()
