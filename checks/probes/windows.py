"""Sliding windows: how far back a model says that a token sees, read from its modules and their configurations."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from checks.probes.holdings import CONFIGURATIONS, settings

NAMED = re.compile(r"window|sliding")


def declared_windows(model: nn.Module) -> dict[str, int]:
    """Every whole number above 0 that a module or its configuration calls a window, by its dotted name."""
    return {name: value for name, value in settings(model) if NAMED.search(name.rpartition(".")[2]) and is_size(value)}


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def window(subject: Any, model: nn.Module, T: int) -> int | None:
    """The smallest declared window that T tokens do not fit, None without one."""
    said = subject.declared("window")
    sizes = declared_windows(model).values() if said is None else (said,)
    return min((w for w in sizes if w < T), default=None)


def holds(subject: Any, model: nn.Module, size: int) -> bool:
    """Whether the subject declares this window or a part of the model holds it; a config may mean other blocks."""
    if subject.declared("window") == size:
        return True
    names = [name.split(".") for name, value in declared_windows(model).items() if value == size]
    return any(len(name) > 1 and name[-2] not in CONFIGURATIONS for name in names)


def in_reach(subject: Any, model: nn.Module, T: int) -> Tensor:
    """[T, T], True where position t (row) must see token s (column): every earlier one, or those of one window."""
    size = window(subject, model, T)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    return past if size is None else past.triu(1 - size)
