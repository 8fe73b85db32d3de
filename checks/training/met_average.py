"""How to make and update a foreign moving average of a model's weights, and where it keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..probes.filled import called, roles_of
from ..subject import Companion

NAMES = {
    "model": "model net network module m online source online_model",
    "parameters": "parameters params weights",
    "named": "named_parameters named_params",
    "state": "state_dict state",
    "decay": "decay beta momentum ema_decay alpha rate mu max_decay tau",
    "device": "device",
    "step": "step steps n iteration it",
}


class MetAverage:
    """An average of the weights of `model`, made by the user's class; the model's parameters by name are averaged."""

    def __init__(self, companion: Companion, model: nn.Module, decay: float | None = None) -> None:
        self.companion, self.model, self.decay = companion, model, decay
        self.updates = 0
        roles = roles_of(companion.value, NAMES)
        self.takes_decay = "decay" in roles.values()
        self.made = called(companion.value, roles, self._values(decay))
        missing = self.read().keys() ^ {name for name, p in model.named_parameters() if p.requires_grad}
        if missing:
            raise NotApplicable(f"where it keeps its average of {min(missing)} was not found")

    def _values(self, decay: float | None) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model": self.model,
            "parameters": list(self.model.parameters()),
            "named": list(self.model.named_parameters()),
            "state": self.model.state_dict(),
        }
        return given if decay is None else {**given, "decay": decay}

    def update(self) -> None:
        update = self.made.update
        called(update, roles_of(update, NAMES), {**self._values(None), "step": self.updates})
        self.updates += 1

    def read(self) -> dict[str, Tensor]:
        """The average of each trainable parameter, as it is kept; {} where it is not found."""
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for kept in vars(self.made).values() if hasattr(self.made, "__dict__") else ():
            found = _among(kept, wanted, self.model)
            if found is not None:
                return found
        inside = self.made if isinstance(self.made, nn.Module) else None
        return (_among(inside, wanted, self.model) if inside is not None else None) or {}


def _among(kept: Any, wanted: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of the wanted names in a container: a dict, a list in the order of the parameters, or a module."""
    if kept is model:
        return None
    if isinstance(kept, nn.Module):
        kept = dict(kept.named_parameters()) | dict(kept.named_buffers())
    if isinstance(kept, Mapping):
        named = {str(name).removeprefix("module."): value for name, value in kept.items()}
        if wanted.keys() <= named.keys() and all(isinstance(named[name], Tensor) for name in wanted):
            kept = [named[name] for name in wanted]
        elif all(id(p) in kept for p in wanted.values()):
            kept = [kept[id(p)] for p in wanted.values()]
        else:
            return None
    if not isinstance(kept, list | tuple) or len(kept) != len(wanted):
        return None
    pairs = list(zip(wanted.items(), kept, strict=True))
    if all(isinstance(value, Tensor) and value.shape == p.shape for (_, p), value in pairs):
        return {name: value.detach().clone() for (name, _), value in pairs}
    return None


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    """Other weights, each by about one more or less than it was."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator).to(p))
