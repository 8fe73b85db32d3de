"""What a model holds beside its registers: tensors where PyTorch does not look for them, and its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3  # nested lists, dicts and plain objects


@dataclass
class Held:
    """A tensor or a module outside its owner's registers; `set` puts another in its place."""

    name: str
    value: Tensor | nn.Module
    set: Callable[[Any], None]

    @property
    def trainable(self) -> bool:
        if isinstance(self.value, nn.Module):
            return any(p.requires_grad for p in self.value.parameters())
        return self.value.requires_grad and self.value.is_leaf


def held_outside(model: nn.Module) -> list[Held]:
    """What the modules hold in plain attributes, lists, dicts and objects, and no parameter, buffer or module is."""
    known = {id(x) for x in (*model.parameters(), *model.buffers(), *model.modules())}
    found: dict[int, Held] = {}
    for name, module in model.named_modules():
        for held in _search(vars(module), name, DEPTH, known):
            found.setdefault(id(held.value), held)
    return list(found.values())


def _search(holder: Any, name: str, depth: int, known: set[int]) -> Iterator[Held]:
    for key, value in list(_items(holder)):
        place = f"{name}.{key}".lstrip(".")
        if isinstance(value, Tensor | nn.Module):
            if id(value) not in known and (isinstance(value, nn.Module) or value.numel()):
                yield Held(place, value, _setter(holder, key))
        elif depth:
            yield from _search(value, place, depth - 1, known)


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(holder, dict):
        yield from holder.items()
    elif isinstance(holder, list | tuple):
        yield from enumerate(holder)
    elif type(holder).__module__.split(".")[0] not in ("builtins", "torch", "collections", "typing", "types"):
        yield from getattr(holder, "__dict__", {}).items()


def _setter(holder: Any, key: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        if isinstance(holder, dict | list):
            holder[key] = value
        elif not isinstance(holder, tuple):
            setattr(holder, key, value)

    return put


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward in training mode may write to registered buffers: a running mean, a router's balance."""
    owned = [(module, key, value) for module in model.modules() for key, value in module._buffers.items()]
    before = [(module, key, value, value.clone()) for module, key, value in owned if value is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, key, value, kept in before:
                module._buffers[key] = value
                if not torch.equal(value, kept):
                    value.copy_(kept)


def renormalized(model: nn.Module) -> set[str]:
    """The tables whose rows are shortened at every forward (nn.Embedding's max_norm), by name: no step changes them."""
    tables = {
        id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None and hasattr(m, "weight")
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


CONFIGURATIONS = ("config", "cfg", "args", "params", "hparams")


def settings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every plain attribute of every module and of its configuration, by its dotted name."""
    for place, module in model.named_modules():
        for key, value in vars(module).items():
            yield f"{place}.{key}".lstrip("."), value
            if key in CONFIGURATIONS:
                fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
                yield from ((f"{place}.{key}.{name}".lstrip("."), held) for name, held in fields.items())
