"""Known bugs, by component: each one small function that damages a fresh reference in one place.

A bug's function takes the reference's parts (`build_model`, `loss`, `generate`, …) and replaces one of them, or one
method of the model that `build_model` gives (`@bug(…, model=True)` hands over the built model instead).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..reference import reference_parts
from ..subject import Subject


@dataclass(frozen=True)
class Bug:
    """One known mistake. `caught_by` lists the checks that must fail on it; the first is the one that names it best."""

    id: str
    component: str  # the module it lives in: attention, positions, loss, …
    says: str  # what is wrong, in one line
    source: str  # where it was reported
    caught_by: tuple[str, ...]
    damage: Callable[[SimpleNamespace], None]
    sizes: dict[str, Any]  # what the reference must be for the bug to matter: positions="rotary", …
    of: Callable[..., SimpleNamespace] = reference_parts  # whose parts are damaged: a variant's for what it alone has
    device: str = "cpu"  # where it shows

    def subject(self, **declared: Any) -> Subject:
        """The damaged reference."""
        parts = self.of(**self.sizes)
        self.damage(parts)
        return Subject(f"bug:{self.id}", parts, **declared)

    def undamaged(self, **declared: Any) -> Subject:
        """The same without the damage."""
        return Subject("transformer", self.of(**self.sizes), **declared)


def bug(
    id: str,
    says: str,
    *,
    caught_by: tuple[str, ...],
    source: str = "",
    model: bool = False,
    of: Callable[..., SimpleNamespace] = reference_parts,
    device: str = "cpu",
    **sizes: Any,
):
    """Marks a function as a bug's damage. With `model=True` it takes the built model rather than the parts."""

    def mark(function: Callable) -> Callable:
        damage = _damage_model(function) if model else function
        component = function.__module__.rpartition(".")[2]
        function.bug = Bug(id, component, says, source, caught_by, damage, sizes, of, device)  # type: ignore[attr-defined]
        return function

    return mark


def _damage_model(function: Callable[[nn.Module], None]) -> Callable[[SimpleNamespace], None]:
    def damage(parts: SimpleNamespace) -> None:
        build = parts.build_model

        def build_damaged(**sizes: Any) -> nn.Module:
            model = build(**sizes)
            function(model)
            return model

        parts.build_model = build_damaged

    return damage


@cache
def all_bugs() -> dict[str, Bug]:
    """Every bug of every module here, by id."""
    found: dict[str, Bug] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            mine = getattr(value, "bug", None)
            if isinstance(mine, Bug):
                if mine.id in found:
                    raise ValueError(f"two bugs are called {mine.id}")
                found[mine.id] = mine
    return found
