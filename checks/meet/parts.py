"""What comes with a model: loss, generate, train_step, tokenizer, …, from its own file or from elsewhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..generation.met_generate import generate_in
from ..loss.forms import loss_in
from .batches import batches_in, makes
from .errors import UsageError
from .sandbox import Sandbox
from .stubs import Stub
from .which_model import Found, find

PARTS = ("loss", "generate", "train_step", "objective", "trainer", "tokenizer", "declares")


def given_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts that the user names: `FILE:NAME` is loaded, anything else is used as it is. Raises UsageError."""
    return {name: _given_part(name, value) for name, value in parts.items()}


def _given_part(name: str, value: Any) -> Any:
    if name not in PARTS:
        raise UsageError(f"no part is called {name!r}: expected one of {', '.join(PARTS)}")
    if not isinstance(value, str):
        return value
    found = find(value)
    part = getattr(found.module, found.name or name, None)
    if part is None or not (callable(part) or name == "tokenizer"):
        there = ", ".join(k for k, v in found.scope.items() if inspect.isfunction(v)) or "no functions"
        raise UsageError(f"{found.shown} has no {found.name or name} to use as {name}; it has {there}")
    return _sandboxed(part, found.sandbox)


def parts_of(found: Found) -> dict[str, Any]:
    """What the file itself defines beside the model: functions called loss, generate, train_step; a tokenizer."""
    parts = {}
    for name in PARTS:
        value = found.scope.get(name)
        data = name in ("tokenizer", "declares")
        own = getattr(value, "__module__", None) == found.module.__name__ or data
        if value is not None and own and (callable(value) or data) and not isinstance(value, nn.Module | Stub):
            parts[name] = _sandboxed(value, found.sandbox)
    other = None if "loss" in parts else loss_in(found.scope, found.module.__name__)
    if other is not None:
        parts["loss"] = _sandboxed(found.scope[other], found.sandbox)
        found.sandbox.remark(f"{other} is used as the loss")
    other = None if "generate" in parts else generate_in(found.scope, found.module.__name__)
    if other is not None:
        parts["generate"] = _sandboxed(found.scope[other], found.sandbox)
        found.sandbox.remark(f"{other} is used as generate")
    module = found.module.__name__
    if any(makes(name, value, module) for name, value in list(found.scope.items())):
        parts["batches"] = functools.cache(lambda: batches_in(found.scope, module, found.sandbox))
    return parts


def _sandboxed(function: Any, sandbox: Sandbox) -> Any:
    """A function of the user's that always runs inside its sandbox; other values as they are."""
    if not inspect.isfunction(function):
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with sandbox:
            return function(*args, **kwargs)

    return run
