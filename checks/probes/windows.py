"""Sliding windows: how far back a model says that a token sees, read from its modules and their configurations."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..subject import Subject
from .module_state import CONFIGURATIONS, settings

NAMED = re.compile(r"window|sliding")


def declared_windows(model: nn.Module) -> dict[str, int]:
    """Every whole number above 0 that a module or its configuration calls a window, by its dotted name."""
    return {name: value for name, value in settings(model) if NAMED.search(name.rpartition(".")[2]) and is_size(value)}


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def window(subject: Subject, model: nn.Module, T: int) -> int | None:
    """The smallest declared window that T tokens do not fit, None without one."""
    said = subject.declared("window")
    sizes = declared_windows(model).values() if said is None else (said,)
    return min((w for w in sizes if w < T), default=None)


def holds(subject: Subject, model: nn.Module, size: int) -> bool:
    """Whether the subject declares this window or a part of the model holds it; a config may mean other blocks."""
    if subject.declared("window") == size:
        return True
    names = [name.split(".") for name, value in declared_windows(model).items() if value == size]
    return any(len(name) > 1 and name[-2] not in CONFIGURATIONS for name in names)


def held_by(block: nn.Module) -> int | None:
    """The one window that parts of a block hold; None where there is none, or more than one."""
    names = [(name.split("."), value) for name, value in declared_windows(block).items()]
    sizes = {value for name, value in names if len(name) < 2 or name[-2] not in CONFIGURATIONS}
    return sizes.pop() if len(sizes) == 1 else None


def reach(seen: Tensor) -> int | None:
    """How many tokens each position sees, itself among them, in a map [T, T]; None where that varies."""
    T, count = len(seen), int(seen[-1].sum())
    return count if bool(seen.eq(torch.ones(T, T, dtype=torch.bool).tril().triu(1 - count)).all()) else None


def in_reach(subject: Subject, model: nn.Module, T: int) -> Tensor:
    """[T, T], True where position t (row) must see token s (column): every earlier one, or those of one window."""
    size = window(subject, model, T)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    return past if size is None else past.triu(1 - size)
