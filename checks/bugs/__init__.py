"""Known bugs, by the part that is wrong: each one small function that damages a fresh reference in one place.

A bug's function takes the built `model`, or the reference's `parts` (`build_model`, `loss`, `generate`, …) to replace
one of them: the name of its parameter says which. Its own name is the bug's id.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..reference import reference_parts
from ..run.order import Check, check_id
from ..subject import Subject


@dataclass(frozen=True)
class Bug:
    """One known mistake. `checks` are those that must fail on it; the first is the one that names it best."""

    id: str
    component: str  # the module it lives in: attention, rotary, loss, …
    says: str  # what is wrong, in one line
    source: str  # where it was reported
    checks: tuple[Check, ...]
    damage: Callable[[SimpleNamespace], None]
    sizes: dict[str, Any]  # what the reference must be for the bug to matter: positions="rotary", …
    of: Callable[..., SimpleNamespace] = reference_parts  # whose parts are damaged: a variant's for what it alone has
    device: str = "cpu"  # where it shows

    @property
    def caught_by(self) -> tuple[str, ...]:
        """The ids of its checks."""
        return tuple(check_id(check) for check in self.checks)

    def subject(self, **declared: Any) -> Subject:
        """The damaged reference."""
        parts = self.of(**self.sizes)
        self.damage(parts)
        return Subject(f"bug:{self.id}", parts, **declared)

    def undamaged(self, **declared: Any) -> Subject:
        """The same without the damage."""
        return Subject("transformer", self.of(**self.sizes), **declared)


def bug(
    says: str,
    *checks: Check,
    id: str = "",
    source: str = "",
    of: Callable[..., SimpleNamespace] = reference_parts,
    device: str = "cpu",
    **sizes: Any,
) -> Callable[[Callable[[Any], None]], Bug]:
    """Makes a Bug of a function that damages `model` or `parts`; `id` where it is not the function's name."""

    def mark(function: Callable[[Any], None]) -> Bug:
        (damages,) = inspect.signature(function).parameters
        if damages not in ("model", "parts"):
            raise ValueError(f"{function.__name__} takes {damages}: a bug damages `model` or `parts`")
        damage = _damage_model(function) if damages == "model" else function
        component = function.__module__.rpartition(".")[2]
        name = id or function.__name__.replace("_", "-")
        return Bug(name, component, says, source, checks, damage, sizes, of, device)

    return mark


def _damage_model(function: Callable[[Any], None]) -> Callable[[SimpleNamespace], None]:
    def damage(parts: SimpleNamespace) -> None:
        build = parts.build_model

        def build_damaged(**sizes: Any) -> nn.Module:
            model: nn.Module = build(**sizes)
            function(model)
            return model

        parts.build_model = build_damaged

    return damage


@cache
def all_bugs() -> dict[str, Bug]:
    """Every bug of every module here, by id."""
    found: dict[str, Bug] = {}
    for module in pkgutil.iter_modules(__path__):
        for mine in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(mine, Bug):
                if mine.id in found:
                    raise ValueError(f"two bugs are called {mine.id}")
                found[mine.id] = mine
    return found
