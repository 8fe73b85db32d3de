"""Wrong optimizers: rules that are not those of their names, and states that are shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..check_optimizer import (
    check_an_optimizer_follows_the_rule_of_its_name,
    check_an_optimizer_keeps_its_parameters_apart,
)
from . import bug, toolbox
from .toolbox import parts_with_companions, replace

State: TypeAlias = dict[str, Any]
Betas: TypeAlias = tuple[float, float]
Group: TypeAlias = dict[str, Any]


@bug("Adam does not correct the bias of its moments", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def adam_without_bias_correction(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            state["m"].lerp_(g, 1 - betas[0])
            state["v"].lerp_(g * g, 1 - betas[1])
            found: Tensor = state["m"] / (state["v"].sqrt() + eps)
            return found

    replace(parts, "optimizer", AdamW)


@bug("Adam does not count its steps: the bias correction stays that of the first",
     check_an_optimizer_follows_the_rule_of_its_name, of=parts_with_companions)  # fmt: skip
def adam_does_not_count(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            state["t"] = 0
            return super().direction(g, state, betas, eps)

    replace(parts, "optimizer", AdamW)


@bug("the weight decay of AdamW is part of its gradient, as in Adam", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def adamw_couples_its_decay(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def move(self, p: Tensor, group: Group) -> None:
            assert p.grad is not None
            p.grad.add_(p, alpha=group["weight_decay"])
            super().move(p, {**group, "weight_decay": 0.0})

    replace(parts, "optimizer", AdamW)


@bug("beta1 and beta2 have changed places", check_an_optimizer_follows_the_rule_of_its_name, of=parts_with_companions)
def adam_swaps_its_betas(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            return super().direction(g, state, (betas[1], betas[0]), eps)

    replace(parts, "optimizer", AdamW)


@bug("Adam leaves eps out: a weight without a gradient becomes NaN", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def adam_forgets_eps(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            return super().direction(g, state, betas, 0.0)

    replace(parts, "optimizer", AdamW)


@bug("the second moment of Adam is a mean of |g|", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def adam_second_moment(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            state["v"].lerp_(g.abs(), 1 - betas[1]).sub_((1 - betas[1]) * g * g).div_(betas[1])
            return super().direction(g, state, betas, eps)

    replace(parts, "optimizer", AdamW)


@bug("an optimizer takes no notice of its weight decay", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def decay_is_left_out(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def move(self, p: Tensor, group: Group) -> None:
            super().move(p, {**group, "weight_decay": 0.0})

    replace(parts, "optimizer", AdamW)


@bug("Lion steps by its momentum, not by the sign of it", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def lion_without_its_sign(parts: SimpleNamespace) -> None:
    class Lion(toolbox.Lion):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            step = torch.lerp(state["m"], g, 1 - betas[0])
            state["m"].lerp_(g, 1 - betas[1])
            return step

    replace(parts, "optimizer", Lion)


@bug("Lion takes the sign of the momentum that it has just updated", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def lion_updates_too_early(parts: SimpleNamespace) -> None:
    class Lion(toolbox.Lion):
        def direction(self, g: Tensor, state: State, betas: Betas, eps: float) -> Tensor:
            found: Tensor = state["m"].lerp_(g, 1 - betas[1]).sign()
            return found

    replace(parts, "optimizer", Lion)


@bug("SGD does not keep its momentum", check_an_optimizer_follows_the_rule_of_its_name, of=parts_with_companions)
def sgd_forgets_its_momentum(parts: SimpleNamespace) -> None:
    class SGD(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.state.clear()
            super().step(closure)

    replace(parts, "optimizer", SGD)


@bug("Muon steps by its momentum without making it orthogonal", check_an_optimizer_follows_the_rule_of_its_name,
     of=parts_with_companions)  # fmt: skip
def muon_does_not_orthogonalize(parts: SimpleNamespace) -> None:
    class Muon(torch.optim.SGD):
        pass

    replace(parts, "optimizer", Muon)


@bug("an optimizer keeps one count of steps for all parameters and raises it for each of them",
     check_an_optimizer_keeps_its_parameters_apart, of=parts_with_companions)  # fmt: skip
def optimizer_shares_its_state(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        def kept(self, p: Tensor) -> State:
            state = super().kept(p)
            state["t"] = self.defaults["t"] = self.defaults.get("t", -1) + 1
            return state

    replace(parts, "optimizer", AdamW)


@bug("an optimizer decays a parameter that has no gradient", check_an_optimizer_keeps_its_parameters_apart,
     of=parts_with_companions)  # fmt: skip
def optimizer_decays_without_a_gradient(parts: SimpleNamespace) -> None:
    class AdamW(toolbox.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
            super().step(closure)

    replace(parts, "optimizer", AdamW)
