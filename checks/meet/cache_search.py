"""Which protocol of a key-value cache a model follows: each that its signature allows is tried.

A protocol that the names declare is accepted if it runs. One that is only guessed is accepted if a text read in two
pieces with the cache has the same logits as the text read at once. Where none is accepted, what surely is a cache and
cannot be read is a fault to report; what came of the others is told.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..watch.calls import each, tensors
from ..watch.location import locate
from . import vocabulary
from .cache import ONLY_CACHES, USES, Protocol, cache_classes, protocols, returned, step
from .call_forms import parameters_of
from .errors import own_frames, place
from .forward import Forward
from .logits import Unreadable
from .sandbox import Sandbox

CLOSE = 1e-3  # in standard deviations of the logits: a guess is right or far off
ARGUMENTS = re.compile(r"missing \d+ required|takes .* positional arguments?|unexpected keyword argument")


@dataclass(frozen=True)
class Found:
    """The protocol that a model follows, else why none is known to work."""

    protocol: Protocol | None
    why_not: str = ""


def search(forward: Forward, model: nn.Module, sandbox: Sandbox, sizes: Mapping[str, Any], tokens: Tensor) -> Found:
    """Tries every protocol on tokens [B, T]."""
    faulty, raised, tried = None, [], []
    for protocol in protocols(model, sandbox, sizes):
        try:
            apart = _apart(forward, model, protocol, tokens)
        except Exception as error:
            if faulty is None and _is_at_fault(forward, model, protocol, tokens, error, sandbox):
                faulty = protocol
            raised.append(f"{protocol.says}: {_told(error, sandbox)}")
            continue
        if apart > CLOSE and protocol.given_back and (grown := _grown_outside(forward, model, protocol, tokens)):
            return Found(grown)
        if protocol.declared or apart <= CLOSE:
            return Found(protocol)
        keeps = _keeps(forward, model, protocol, tokens)
        if faulty is None and keeps and not _unfilled(forward, model):
            faulty = protocol
        tried.append(
            f"{protocol.says}: the logits of a text read in pieces are {apart:.2g} standard deviations off"
            + ("" if keeps else ", and the model keeps nothing between the calls")
        )
    return Found(faulty, "" if faulty else _why_not(forward, model, sandbox, tried or raised))


def _why_not(forward: Forward, model: nn.Module, sandbox: Sandbox, tried: list[str]) -> str:
    """What speaks of a cache though none was found, and what came of trying it; "" if nothing does."""
    given = [p.name for p in parameters_of(model) if vocabulary.squash(p.name) in vocabulary.CACHES]
    given += [p.name for p in parameters_of(model) if vocabulary.squash(p.name) in USES]
    if tried:
        of = [f"forward takes {given[0]}= ({_line(model)}), but no way to fill it was found"] if given else []
        unfilled = [f"no check fills {name}=" for name in _unfilled(forward, model)]
        unseen = ["no class called a cache is in the file"] if given and not cache_classes(model, sandbox) else []
        return ": ".join([*of, "; ".join([*tried, *unseen, *unfilled])])
    if given:
        return f"forward takes {given[0]}= ({_line(model)}), but no way to fill it is known"
    names = [cls.__name__ for cls in cache_classes(model, sandbox)]
    return f"the file defines {names[0]}, but no argument of forward ({_line(model)}) takes a cache" if names else ""


def _line(model: nn.Module) -> str:
    where = locate(model, type(model).__name__)
    return f"{where.file}:{where.line}"


def _told(error: Exception, sandbox: Sandbox) -> str:
    line, said = place(error, sandbox), " ".join(str(error).split())[:160]
    if isinstance(error, Unreadable):
        return said
    return f"it raises {type(error).__name__}: {said}" + (f" ({line})" if line else "")


def _unfilled(forward: Forward, model: nn.Module) -> list[str]:
    """Arguments of forward that may tell it more of a cache, and that no protocol fills."""
    _tokens, *parameters = parameters_of(model)
    known = vocabulary.CACHES | vocabulary.STARTS | vocabulary.TARGETS | {*USES}
    return [
        p.name
        for p in parameters
        if (plain := vocabulary.squash(p.name)) not in known
        and p.name not in forward.more
        and "mask" not in plain
        and not plain.startswith(("return", "output"))
    ]


def _is_at_fault(
    forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor, error: Exception, sandbox: Sandbox
) -> bool:
    """Whether the model, and not a cache of the wrong form, must be what makes a call raise."""
    if protocol.given_back and _gives_back(forward, model, protocol, tokens):
        return True
    if (protocol.kept and not protocol.given_back) or not list(own_frames(error, sandbox)):
        return False  # what it returns may be something else than a cache
    return _mistaken(error, model, sandbox) or (
        _keeps(forward, model, protocol, tokens) and not _unfilled(forward, model)
    )


def _mistaken(error: Exception, model: nn.Module, sandbox: Sandbox) -> bool:
    """Whether the error is one of the code itself: a name that it never defines, or its own method called wrongly."""
    kinds = cache_classes(model, sandbox)
    if isinstance(error, NameError):
        return True
    if isinstance(error, AttributeError):
        of_cache = isinstance(error.obj, ModuleType) or type(error.obj) in kinds
        return of_cache and not _defined(str(error.name), sandbox)
    return isinstance(error, TypeError) and len(kinds) == 1 and ARGUMENTS.search(str(error)) is not None


def _defined(name: str, sandbox: Sandbox) -> bool:
    """Whether the user's code sets or defines an attribute of this name, or spells it in a string."""
    return any(
        (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name)
        or (isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.Constant) and node.value == name)
        for source in sandbox.sources.values()
        for node in source.nodes
    )


@torch.no_grad()
def _keeps(forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor) -> bool:
    """Whether a first piece of text, read into the cache, has the right logits and leaves something there."""
    first = tokens.flip(1)[:, : tokens.shape[1] // 2].contiguous()  # a cache inside holds the others already
    try:
        cache = protocol.new(model, len(tokens))
        before = _held(model, cache.state)
        got = step(forward, model, first, cache, {})
        after = _held(model, cache.state)
        want = forward.logits(model, first)
    except Exception:
        return False
    if not float((got - want[:, -got.shape[1] :]).abs().max()) <= CLOSE * float(want.std()):
        return False
    return len(after) != len(before) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(after, before, strict=True)
    )


def _held(model: nn.Module, state: Any) -> list[Tensor]:
    """Copies of the tensors in a cache, and of those of the model that are called one."""
    found = _inside(state)
    for name, module in model.named_modules():
        own = {**module._buffers, **{k: v for k, v in vars(module).items() if not isinstance(v, nn.Module)}}
        for key, value in own.items():
            if not key.startswith("_") and ONLY_CACHES.search(vocabulary.squash(f"{name}.{key}")):
                found += _inside(value)
    return found


def _inside(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _inside(item)]
    if isinstance(value, nn.Module):
        return [x.detach().clone() for x in value.buffers()] + tensors(list(vars(value).values()))
    return tensors(value)


@torch.no_grad()
def _grown_outside(forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor) -> Protocol | None:
    """The protocol by which each call returns the keys and values of its own tokens only, and the caller appends them.

    None unless the text read so has the logits of the text read at once: a model may return too little by mistake. That
    is also one that returns them under the name of the argument, which says that they are all that it needs.
    """
    output = forward.call.run(model, tokens, **protocol.given(protocol.new(model, len(tokens)), tokens))
    if (protocol.given_back in output) if isinstance(output, Mapping) else hasattr(output, protocol.given_back):
        return None
    two, three = (_first_state(forward, model, protocol, tokens[:, :n].contiguous()) for n in (2, 3))
    axes = [_time_axis(a, b) for a, b in zip(held_tensors(two), held_tensors(three), strict=False)]

    def appended(output: Any, before: Any) -> Any:
        new = returned(output, before)
        if before is None:
            return new
        joined = (
            a if axis is None else torch.cat((b, a), dim=axis)
            for b, a, axis in zip(held_tensors(before), held_tensors(new), axes, strict=True)
        )
        return each(new, lambda _: next(joined))

    grown = replace(protocol, says=f"{protocol.says} for its own tokens, appended by the caller", kept=appended)
    try:
        return grown if _apart(forward, model, grown, tokens) <= CLOSE else None
    except Exception:
        return None


def _first_state(forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor) -> Any:
    cache = protocol.new(model, len(tokens))
    step(forward, model, tokens, cache, {})
    return cache.state


def _time_axis(two: Tensor, three: Tensor) -> int | None:
    """The axis along which the keys of two tokens and of three differ; None where there is none such."""
    return next((axis for axis, sizes in enumerate(zip(two.shape, three.shape, strict=False)) if sizes == (2, 3)), None)


def held_tensors(state: Any) -> list[Tensor]:
    """Every tensor in a cache, in the order in which `each` meets them."""
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    each(state, take)
    return found


@torch.no_grad()
def _gives_back(forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor) -> bool:
    """Whether the model returns a cache for a first piece of text, without being given one."""
    cache = protocol.new(model, len(tokens))
    try:
        step(forward, model, tokens[:, : tokens.shape[1] // 2].contiguous(), cache, {})
    except Exception:
        return False
    return cache.state is not None


@torch.no_grad()
def _apart(forward: Forward, model: nn.Module, protocol: Protocol, tokens: Tensor) -> float:
    """How much the logits of a text read in pieces differ from those read at once, in standard deviations.

    Raises if the text cannot be read so.
    """
    cut = tokens.shape[1] // 2
    whole = forward.logits(model, tokens)
    cache = protocol.new(model, len(tokens))
    step(forward, model, tokens[:, :cut].contiguous(), cache, {})
    pieces = [
        step(forward, model, tokens[:, t : t + 1].contiguous(), cache, {}) for t in range(cut, tokens.shape[1])
    ]  # fmt: skip
    if protocol.kept is not None and cache.state is None:
        raise Unreadable("the model returns no cache")
    return float((torch.cat(pieces, dim=1) - whole[:, cut:]).abs().max() / whole.std())
