"""The optimizer that a model makes for itself, in `configure_optimizers(weight_decay, learning_rate, …)`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..expect import NotApplicable
from ..meet.vocabulary import MAKES_ITS_OPTIMIZER, squash
from ..subject import Subject

DECAY = 0.1
VALUES: dict[str, Any] = {
    "weightdecay": DECAY, "wd": DECAY, "learningrate": 1e-3, "lr": 1e-3, "maxlr": 1e-3, "betas": (0.9, 0.95),
    "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "devicetype": "cpu", "device": "cpu", "fused": False,
}  # fmt: skip


@dataclass(frozen=True)
class Groups:
    """The optimizer of a model, by the method that made it."""

    model: nn.Module
    method: str
    optimizer: torch.optim.Optimizer

    @property
    def held(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def decay_of(self, parameter: nn.Parameter) -> float | None:
        """The weight decay of a parameter; None if the optimizer does not hold it."""
        groups = (g for g in self.optimizer.param_groups if any(parameter is p for p in g["params"]))
        return next((float(group.get("weight_decay", 0.0)) for group in groups), None)


def met_groups(subject: Subject) -> Groups:
    """Raises NotApplicable if the model has no such method, or none that can be called."""
    model = subject.build(seed=subject.seed)
    method = next((name for name in MAKES_ITS_OPTIMIZER if callable(getattr(model, name, None))), None)
    if method is None:
        raise NotApplicable("the model has no method that makes its optimizer, such as configure_optimizers")
    function = getattr(model, method)
    try:
        with subject.running():
            made = function(**_arguments(function))
    except NotApplicable:
        raise
    except Exception as error:  # it may need a trainer, a configuration, a network
        raise NotApplicable(f"{method} cannot be called alone: {type(error).__name__}: {str(error)[:100]}") from None
    return Groups(model, method, _optimizer_in(made, method))


def _arguments(function: Any) -> dict[str, Any]:
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if (plain := squash(name)) in VALUES:
            given[name] = VALUES[plain]
        elif plain.endswith(("config", "cfg", "args", "hparams")):
            spelled = {"weight_decay": DECAY, "learning_rate": 1e-3, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
            given[name] = SimpleNamespace(**spelled)
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise NotApplicable(f"what its optimizer needs as {name} is not known")
    return given


def _optimizer_in(made: Any, method: str) -> torch.optim.Optimizer:
    """The optimizer itself, the first of a tuple or list, or that under "optimizer"."""
    while not isinstance(made, torch.optim.Optimizer):
        inner = made.get("optimizer") if isinstance(made, dict) else made[0] if isinstance(made, tuple | list) else None
        if inner is None:
            raise NotApplicable(f"{method} returns {type(made).__name__}, not an optimizer")
        made = inner
    return made
