"""Where a rule breaks: the subject's modules wrapped, their inputs and outputs compared between two runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from checks.expect import Where


@dataclass
class Call:
    """One finished call of one module: its floating-point tensors in and out, detached copies."""

    module: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Call]]:
    """Records every module's calls, in the order in which they finish. Wraps `forward`: some code calls it directly."""
    calls: list[Call] = []
    modules = [(name or type(model).__name__, module) for name, module in model.named_modules()]
    for name, module in modules:
        _wrap(module, name, calls)
    try:
        yield calls
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)


def _wrap(module: nn.Module, name: str, calls: list[Call]) -> None:
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        inputs = tensors((args, kwargs))
        result = forward(*args, **kwargs)
        calls.append(Call(name, inputs, tensors(result)))
        return result

    module.__dict__["forward"] = wrapped


def tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors inside nested tuples, lists and dicts, as detached copies."""
    if isinstance(value, Tensor):
        return [value.detach().clone()] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in tensors(item)]
    return []


def first_breaking(
    model: nn.Module, run: Callable[[], Any], again: Callable[[], Any], breaks: Callable[[Tensor, Tensor], bool]
) -> Where | None:
    """The first module, in execution order, whose output breaks the rule between two runs while its inputs do not.

    `breaks(a, b)` compares the same tensor of the two runs (same shape); tensors whose shapes differ are passed over.
    """
    with recorded(model) as one:
        run()
    with recorded(model) as two:
        again()

    def broken(a: list[Tensor], b: list[Tensor]) -> bool:
        return any(x.shape == y.shape and breaks(x, y) for x, y in zip(a, b, strict=False))

    for a, b in zip(one, two, strict=False):
        if a.module == b.module and broken(a.outputs, b.outputs) and not broken(a.inputs, b.inputs):
            return locate(model, a.module)
    return None


def locate(model: nn.Module, name: str) -> Where:
    """A module's class, and the file and line of its forward (of its class for one of torch's own)."""
    module = model if name == type(model).__name__ else model.get_submodule(name)
    try:
        file, line = inspect.getsourcefile(type(module)) or "", inspect.getsourcelines(type(module).forward)[1]
    except (OSError, TypeError):
        file, line = "", 0
    return Where(name, type(module).__name__, file, line)
