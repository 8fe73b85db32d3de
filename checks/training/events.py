"""What a train_step calls, in order: backward, clipping, optimizer and scheduler steps, as it makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Events:
    """The calls of one step by name, and the gradients that each step of the optimizer found."""

    names: list[str] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return " → ".join(self.names)


class Ticks(torch.optim.lr_scheduler.LambdaLR):
    """A schedule that changes nothing and says when it is stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer, events: Events) -> None:
        self.events = Events()
        super().__init__(optimizer, lambda _: 1.0)
        self.events = events  # its own first step is no one else's

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.events.names.append("scheduler.step")
        super().step(*args, **kwargs)


@contextmanager
def watched_events(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Events]:
    """Collects what is called of this optimizer and of Tensor.backward while it lasts."""
    events = Events()
    backward = torch.Tensor.backward

    def stepped(*_: Any) -> None:
        events.names.append("optimizer.step")
        given = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        events.gradients.append(torch.cat(given).clone() if given else torch.zeros(0))

    def backed(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.names.append("backward")
        return backward(tensor, *args, **kwargs)

    hook = optimizer.register_step_pre_hook(stepped)
    replace(torch.Tensor, "backward", backed)
    try:
        yield events
    finally:
        hook.remove()
        replace(torch.Tensor, "backward", backward)


def replace(owner: Any, name: str, function: Callable) -> None:
    setattr(owner, name, function)
