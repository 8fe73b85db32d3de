"""Wrong moving averages of the weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from ..check_average import (
    check_an_average_is_a_copy,
    check_an_average_moves_by_its_decay,
    check_averaged_weights_are_put_back,
)
from . import bug
from .toolbox import Average, parts_with_companions, replace


@bug("an average of the weights holds the weights themselves", check_an_average_is_a_copy, of=parts_with_companions)
def average_is_the_weights(parts: SimpleNamespace) -> None:
    class NoCopy(Average):
        def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
            super().__init__(model, decay)
            self.shadow = dict(model.state_dict())

        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                self.shadow[name] = self.decay * self.shadow[name] + (1 - self.decay) * p.detach()

    replace(parts, "average", NoCopy)


@bug("an update of an average writes into the model", check_an_average_is_a_copy, of=parts_with_companions)
def average_writes_the_weights(parts: SimpleNamespace) -> None:
    class WritesBack(Average):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                self.shadow[name] = p.mul_(1 - self.decay).add_(self.shadow[name], alpha=self.decay).clone()

    replace(parts, "average", WritesBack)


@bug(
    "an average keeps 1 - decay of itself and takes decay of the weights: it averages hardly anything",
    check_an_average_moves_by_its_decay,
    of=parts_with_companions,
)
def average_swaps_its_decay(parts: SimpleNamespace) -> None:
    class Swapped(Average):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                self.shadow[name].lerp_(p, self.decay)

    replace(parts, "average", Swapped)


@bug("an average adds the weights without their share", check_an_average_moves_by_its_decay, of=parts_with_companions)
def average_adds_without_its_share(parts: SimpleNamespace) -> None:
    class Adds(Average):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                self.shadow[name].mul_(self.decay).add_(p)

    replace(parts, "average", Adds)


@bug("an average is computed and not kept", check_an_average_moves_by_its_decay, of=parts_with_companions)
def average_never_moves(parts: SimpleNamespace) -> None:
    class Forgets(Average):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                shadow = self.shadow[name]
                shadow = self.decay * shadow + (1 - self.decay) * p

    replace(parts, "average", Forgets)


@bug("an average leaves the biases and norms out", check_an_average_moves_by_its_decay, of=parts_with_companions)
def average_misses_parameters(parts: SimpleNamespace) -> None:
    class Matrices(Average):
        @torch.no_grad()
        def update(self, model: nn.Module) -> None:
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    self.shadow[name].lerp_(p, 1 - self.decay)

    replace(parts, "average", Matrices)


@bug("averaged weights reach only the matrices of the model", check_averaged_weights_are_put_back,
     of=parts_with_companions)  # fmt: skip
def average_applied_in_part(parts: SimpleNamespace) -> None:
    class Matrices(Average):
        @torch.no_grad()
        def apply(self, model: nn.Module) -> None:
            self.backup = {name: p.detach().clone() for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                if p.dim() > 1:
                    p.copy_(self.shadow[name])

    replace(parts, "average", Matrices)


@bug(
    "the backup of the weights is their state_dict: applying the average overwrites it",
    check_averaged_weights_are_put_back,
    of=parts_with_companions,
)
def average_backup_is_no_copy(parts: SimpleNamespace) -> None:
    class NoBackup(Average):
        @torch.no_grad()
        def apply(self, model: nn.Module) -> None:
            self.backup = model.state_dict()
            for name, p in model.named_parameters():
                p.copy_(self.shadow[name])

    replace(parts, "average", NoBackup)


@bug(
    "applying an average hands its tensors to the model, and restoring writes into them",
    check_averaged_weights_are_put_back,
    of=parts_with_companions,
)
def average_lost_in_restoring(parts: SimpleNamespace) -> None:
    class HandedOver(Average):
        @torch.no_grad()
        def apply(self, model: nn.Module) -> None:
            self.backup = {name: p.detach().clone() for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.data = self.shadow[name]

    replace(parts, "average", HandedOver)
