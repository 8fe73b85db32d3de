"""The calls of a model's modules, with their inputs and outputs, and the first module at which a rule breaks.

Execution order is the order in which calls finish. So a module that breaks a rule comes before the modules that use its
output, and before the module that contains it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import Where
from .location import locate

DEPTH = 4  # levels of nesting searched for tensors: an output object, its cache, the cache's layers, their tensors


@dataclass
class Call:
    """One finished call of one module. Every tensor is a detached copy, made before later code could change it."""

    module: str  # dotted name
    nth: int  # which call of this module, from 0
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    before: Any = None  # the result of `watch()` before the call
    after: Any = None  # and after it

    @property
    def inputs(self) -> list[Tensor]:
        """Floating-point tensors only."""
        return tensors((self.args, self.kwargs))

    @property
    def outputs(self) -> list[Tensor]:
        return tensors(self.result)


@contextmanager
def recorded(model: nn.Module, watch: Callable[[], Any] = lambda: None) -> Iterator[list[Call]]:
    """Records every call of every module in execution order, and the result of `watch()` before and after each.

    Wraps `forward` instead of adding hooks, because some code calls it directly. A module that has several names is
    recorded under the first.
    """
    calls: list[Call] = []
    wrapped = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            wrapped.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _recording(module.forward, name or type(model).__name__, calls, watch)
    try:
        yield calls
    finally:
        for module, before in wrapped:
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before


def _recording(
    forward: Callable[..., Any], name: str, calls: list[Call], watch: Callable[[], Any]
) -> Callable[..., Any]:
    numbers = count()

    @functools.wraps(forward)  # some code looks up which arguments a forward takes
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = Call(name, next(numbers), copied(args), copied(kwargs), None, watch())
        result = forward(*args, **kwargs)
        call.result, call.after = copied(result), watch()
        calls.append(call)
        return result

    return wrapped


def each(value: Any, change: Callable[[Tensor], Tensor], other: Callable[[Any], Any] = lambda thing: thing) -> Any:
    """The same nested tuples, lists, dicts and output objects: `change` applied to every tensor, `other` to the rest.

    An output object is one of a class of dict, of a dataclass, or with tensors as attributes. What holds something is
    copied, not changed.
    """
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: each(item, change, other) for key, item in value.items()}
    if isinstance(value, dict):
        same = copy.copy(value)
        for key, item in value.items():
            same[key] = each(item, change, other)
        return same
    if isinstance(value, list | tuple):
        items = [each(item, change, other) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if names := _held_by(value):
        same = copy.copy(value)
        for name in names:
            object.__setattr__(same, name, each(getattr(value, name), change, other))  # which may be frozen
        return same
    return other(value)


def _held_by(value: Any) -> list[str]:
    """The attributes of an object that holds tensors and little else; none of any other."""
    if isinstance(value, nn.Module | type) or callable(value):
        return []
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return names if tensors(value) else []
    held = getattr(value, "__dict__", {})
    return list(held) if any(isinstance(item, Tensor) for item in held.values()) else []


def copied(value: Any) -> Any:
    return each(value, lambda tensor: tensor.detach().clone(), _held)


def _held(value: Any) -> Any:
    """An object with the tensors that it holds now: the ones that it holds later may be different."""
    held = tensors(value)
    return Held(value, held) if held else value


@dataclass
class Held:
    """An object in a call's arguments or result (a cache, an output object), and the tensors it held at the time."""

    object: Any
    then: list[Tensor]


def tensors(value: Any, depth: int = DEPTH) -> list[Tensor]:
    """The floating-point tensors inside nested tuples, lists, dicts and objects, as detached copies."""
    if isinstance(value, Held):
        return value.then
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() else []
    return [t for item in _items(value) for t in tensors(item, depth - 1)] if depth else []


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, nn.Module | type) or callable(value):
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def first_breaking(
    model: nn.Module, run: Callable[[], Any], again: Callable[[], Any], breaks: Callable[[Tensor, Tensor], bool]
) -> Where | None:
    """The first module, in execution order, whose output breaks the rule between two runs while its inputs do not.

    `breaks(a, b)` compares the same tensor of the two runs. Tensors of different shapes are skipped. Calls are paired
    by module and number, so that a call made in one run only (of an expert, say) does not misalign the rest.
    """
    with recorded(model) as one:
        run()
    with recorded(model) as two:
        again()
    others = {(call.module, call.nth): call for call in two}

    def broken(a: list[Tensor], b: list[Tensor]) -> bool:
        return any(x.shape == y.shape and breaks(x, y) for x, y in zip(a, b, strict=False))

    for a in one:
        b = others.get((a.module, a.nth))
        if b is not None and broken(a.outputs, b.outputs) and not broken(a.inputs, b.inputs):
            return locate(model, a.module)
    return None


def first_bad(model: nn.Module, run: Callable[[], Any], bad: Callable[[Tensor], bool]) -> Where | None:
    """The first module, in execution order, with a bad tensor (a NaN, say) in its output and none in its inputs."""
    with recorded(model) as calls:
        run()
    for call in calls:
        if any(map(bad, call.outputs)) and not any(map(bad, call.inputs)):
            return locate(model, call.module)
    return None


def first_changing(model: nn.Module, run: Callable[[], Any], watch: Callable[[], Any]) -> Where | None:
    """The first module, in execution order, whose call changes what `watch()` sees: a random state, a weight."""
    with recorded(model, watch) as calls:
        run()
    return next((locate(model, call.module) for call in calls if call.before != call.after), None)
