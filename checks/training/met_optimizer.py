"""How to make a foreign optimizer and step it, which published rule its name means, and what it was given."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..meet.vocabulary import squash
from ..probes.filled import called, roles_of
from ..subject import Companion, Subject
from .rules import Settings

NAMES = {
    "params": "params parameters model_params param_list p",
    "lr": "lr learning_rate step_size eta",
    "betas": "betas",
    "beta1": "beta1 beta_1 b1",
    "beta2": "beta2 beta_2 b2",
    "eps": "eps epsilon",
    "weight_decay": "weight_decay wd l2 lambda_wd weight_decay_rate lambda_",
    "momentum": "momentum mu",
    "corrects": "correct_bias bias_correction",
    "ignored": "nesterov maximize foreach fused capturable differentiable amsgrad centered dampening lr_decay "
    "decoupled_weight_decay initial_accumulator_value",
}
OWN = {"rmsprop": {"alpha": "alpha decay_rate rho beta decay gamma"}, "sgd": {"momentum": "momentum mu beta"},
       "muon": {"momentum": "momentum mu beta"}, "adam": {"lr": "lr learning_rate step_size eta alpha"},
       "adamw": {"lr": "lr learning_rate step_size eta alpha"}}  # fmt: skip
NAMED = re.compile(
    r"(my|custom|simple|naive|manual|toy|our|basic|scratch|own|tiny|plain|vanilla|singledevice)?"
    r"(adamw|adam|sgd|rmsprop|adagrad|lion|muon)"
    r"(optimizer|optim|opt|momentum|withmomentum|m|scratch|fromscratch|custom|impl|manual)?"
)
ASKED = Settings()


class MetOptimizer:
    """A subject's optimizer: `rule` is what its name means, `settings` what it is given where it takes that."""

    def __init__(self, companion: Companion) -> None:
        self.companion = companion
        named = NAMED.fullmatch(squash(companion.name))
        if named is None:
            raise NotApplicable("no published rule is known by its name")
        self.rule = named[2]
        self.roles = roles_of(companion.value, {**NAMES, **OWN.get(self.rule, {})})
        self.settings, self.unknown = self._settings()
        parameters = inspect.signature(companion.value).parameters
        self.others = [  # settings that the published rule does not have, or that make it another
            name
            for name, role in self.roles.items()
            if not role or (role == "ignored" and name != "nesterov" and parameters[name].default is True)
        ]

    def _settings(self) -> tuple[Settings, set[str]]:
        """What is given; and of what the rule needs, what it can only have chosen itself."""
        parameters, given = inspect.signature(self.companion.value).parameters, set(self.roles.values())
        settings, unknown = ASKED, set[str]()
        if "weight_decay" not in given or self.rule == "muon":
            settings = replace(settings, weight_decay=0.0)
        if "momentum" not in given or self.rule not in ("sgd", "muon"):
            settings = replace(settings, momentum=0.0)
        if "betas" not in given and not {"beta1", "beta2"} <= given:
            unknown.add("betas")
        unknown |= {name for name in ("eps", "alpha", "lr") if name not in given}
        nesterov = parameters.get("nesterov")
        return replace(settings, nesterov=nesterov is not None and bool(nesterov.default)), unknown

    def run(
        self, subject: Subject, starts: Sequence[Tensor], steps: Sequence[Sequence[Tensor | None]]
    ) -> list[list[Tensor]]:
        """The parameters after each step, which has a gradient, or None, for each of them."""
        params = [nn.Parameter(start.clone()) for start in starts]
        h, path = self.settings, []
        values: dict[str, Any] = {
            "params": params, "lr": h.lr, "betas": h.betas, "beta1": h.betas[0], "beta2": h.betas[1], "eps": h.eps,
            "weight_decay": h.weight_decay, "momentum": h.momentum, "alpha": h.alpha, "corrects": True,
        }  # fmt: skip
        with warnings.catch_warnings(), subject.running():
            warnings.simplefilter("ignore")
            made = called(self.companion.value, self.roles, values)
            for grads in steps:
                for p, g in zip(params, grads, strict=True):
                    p.grad = None if g is None else g.clone()
                called(made.step, roles_of(made.step, {}), {})
                path.append([p.detach().clone() for p in params])
        return path


def gradients(shape: tuple[int, ...], steps: int, scale: float, seed: int) -> list[Tensor]:
    """Of every step, unequal; one entry always 0."""
    generator = torch.Generator().manual_seed(seed)
    found = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    for g in found:
        g.view(-1)[0] = 0.0
    return found


def well_conditioned(shape: tuple[int, int], seed: int) -> Tensor:
    """A matrix whose singular values go from 1 to 1/6."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    found: Tensor = u @ torch.diag(torch.linspace(1, 1 / 6, min(shape))) @ v
    return found
