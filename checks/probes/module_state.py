"""What a model holds: tensors and modules that PyTorch has not registered, buffers, settings, shared parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import advise, fail
from ..subject import Subject
from ..watch.dropout import reads_mode

DEPTH = 3  # nested lists, dicts and plain objects
CONFIGURATIONS = ("config", "cfg", "args", "params", "hparams")
MODE_BY_DESIGN = ("expert", "moe", "router", "switch", "gate", "batchnorm", "quant")
TIE_DECLARED = re.compile(
    r"tied?|tying|(tied?|tying|shared?)_(word_)?(embeddings?|embs?|weights?|head)|weight_(tying|sharing)"
)


@dataclass
class Held:
    """A tensor or a module that its owner has not registered; `set` puts another in its place."""

    name: str
    value: Tensor | nn.Module
    set: Callable[[Any], None]

    @property
    def trainable(self) -> bool:
        if isinstance(self.value, nn.Module):
            return any(p.requires_grad for p in self.value.parameters())
        return self.value.requires_grad and self.value.is_leaf


def held_outside(model: nn.Module) -> list[Held]:
    """Tensors and modules in plain attributes, lists, dicts and objects that are not registered anywhere."""
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


def left_behind(model: nn.Module, constants: list[Held], read: Callable[[], Any]) -> bool:
    """Whether `read`, a forward on the meta device, fails only because these tensors are elsewhere.

    On the meta device nothing is computed. Leaves the model there.
    """

    def reads() -> bool:
        try:
            read()
        except Exception:
            return False
        return True

    model.to("meta")
    if reads():
        return False
    for held in constants:
        held.set(held.value.to("meta"))
    return reads()


def every_module(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The registered modules by name, then those that a plain list, tuple or dict of a module hides."""
    registered = dict(model.named_modules())
    yield from registered.items()
    known = {id(module) for module in registered.values()}
    for owner, module in registered.items():
        for attribute in vars(module).keys() - vars(nn.Module()).keys():
            for path, hidden in _modules_in(vars(module)[attribute], f"{owner}.{attribute}".lstrip(".")):
                for name, inner in hidden.named_modules(prefix=path):
                    if id(inner) not in known:
                        known.add(id(inner))
                        yield name, inner


def _modules_in(value: Any, path: str, depth: int = DEPTH) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _modules_in(item, f"{path}[{key!r}]", depth - 1)
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _modules_in(item, f"{path}[{index}]", depth - 1)


def frozen(module: nn.Module) -> bool:
    """Whether a module has weights and all are frozen: then it may stay in evaluation mode."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def mode_by_design(model: nn.Module) -> str:
    """A module whose class, by its name, may legitimately compute something else in training."""
    for name, module in model.named_modules():
        if reads_mode(module) and any(word in type(module).__name__.lower() for word in MODE_BY_DESIGN):
            return f"{name} ({type(module).__name__})"
    return ""


def set_mode(model: nn.Module, training: bool) -> None:
    """As `model.train(training)`, which takes a quarter of a small forward, but quick where nothing is to change."""
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None:
            if module.training != training:  # code may leave a single module in the other mode
                model.train(training)
                return
            waiting.extend(module._modules.values())


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores registered buffers that a forward in training mode writes to: a running mean, a router's balance."""
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
    """Names of the tables whose rows every forward renormalizes (nn.Embedding's max_norm)."""
    tables = {
        id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None and hasattr(m, "weight")
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}


def settings(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every plain attribute of every module and of its configuration, by its dotted name."""
    for place, module in model.named_modules():
        for key, value in vars(module).items():
            yield f"{place}.{key}".lstrip("."), value
            if key in CONFIGURATIONS:
                yield from ((f"{place}.{key}.{name}".lstrip("."), held) for name, held in _fields(value).items())


def _fields(configuration: Any) -> Mapping[str, Any]:
    """What a configuration holds, by name: a dictionary, an object, a NamedTuple, or a class with slots."""
    if isinstance(configuration, Mapping):
        return configuration
    if hasattr(configuration, "_asdict"):
        return dict(configuration._asdict())
    slots = [name for cls in type(configuration).__mro__ for name in getattr(cls, "__slots__", ())]
    held = {name: getattr(configuration, name) for name in slots if hasattr(configuration, name)}
    return {**held, **getattr(configuration, "__dict__", {})}


def ties(model: nn.Module) -> list[list[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def expect_declared_tie(subject: Subject, model: nn.Module) -> None:
    """If a configuration says that head and embedding are tied, some matrix with a row per symbol must be shared."""
    V = subject.sizes.vocab_size
    tables = [name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2 and V in p.shape]
    says = [
        name for name, value in settings(model) if value is True and TIE_DECLARED.fullmatch(name.rpartition(".")[2])
    ]
    shared = {name for names in ties(model) for name in names}
    if says and len(tables) > 1 and not shared.intersection(tables):
        fail(
            f"{says[0]} is true, but {' and '.join(tables)} are separate parameters: head and embedding are not tied",
            likely=("tied-weights-broken",),
            advice="Set self.head.weight = self.embedding.weight once both exist, before the optimizer is made.",
            names=tables,
        )


def expect_no_twins(model: nn.Module) -> None:
    """No two parameters may share one storage: each has its own gradient, and both are updated and decayed."""
    held: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, parameter in model.named_parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape), parameter.stride())
        if parameter.numel() and key in held:
            fail(
                f"{held[key]} and {name} are two parameters that share one storage: an optimizer updates and decays it "
                "twice per step",
                likely=("tie-by-storage",),
                advice="Assign the parameter itself (head.weight = embedding.weight), never its .data.",
                names=[held[key], name],
            )
        held[key] = name


def tie_trials(subject: Subject, model: nn.Module, T: int) -> Iterator[tuple[str, nn.Module]]:
    """The model after each operation that may separate tied parameters."""
    model.load_state_dict(subject.build(seed=subject.seed + 1).state_dict())
    yield "after load_state_dict", model
    try:
        yield "after copy.deepcopy", copy.deepcopy(model)
    except Exception as error:
        advise(f"the model cannot be copied: {type(error).__name__}: {error}")
    for _ in range(2):
        model.zero_grad()
        torch.autograd.backward(subject.logits(model.train(), subject.tokens(2, T)).square().mean())
        with torch.no_grad():  # as torch.optim.SGD does, which would import PyTorch's compiler
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=1e-3)
    yield "after two training steps", model.eval()
    yield ("after .bfloat16()", model.bfloat16()) if subject.large else ("after .double()", model.double())
