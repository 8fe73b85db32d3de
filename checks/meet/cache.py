"""A model's key-value cache: which of the usual protocols it follows, by its parameters' names and by trying.

A protocol that the names declare is accepted if it runs; so is a cache that forward returns under one of its names and
cannot read again, which is a fault to report. One that is only guessed is accepted if a text read in two
pieces with the cache has the same logits as the text read at once.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..watch.calls import each
from . import vocabulary
from .arguments import Filling, signature_of
from .build import scope_of
from .call_forms import parameters_of, set_up_caches
from .forward import Forward
from .logits import Unreadable, tensors_in
from .sandbox import Sandbox

RESETS = ("reset_kv_cache", "reset_cache", "clear_cache", "clear_kv_cache", "empty_cache", "reset_caches", "reset")
KEPT = ("past_key_values", "kv_cache", "cache", "past", "presents", "state", "mems")
ONLY_CACHES = re.compile("cache|past|present|kv")  # a state or a memory may be something else
CLOSE = 1e-3  # in standard deviations of the logits: a guess is right or far off


@dataclass
class Cache:
    """What a model has read so far: its own state, and the number of tokens."""

    protocol: Protocol
    state: Any = None
    length: int = 0
    inside_the_model: bool = False
    mask: Tensor | None = None  # of all tokens so far, if there was padding among them

    def seen(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """The mask [B, S] of the tokens so far and these; None as long as there was no padding."""
        if mask is None and self.mask is None:
            return None
        B, T = tokens.shape
        before = self.mask if self.mask is not None else tokens.new_ones(B, self.length, dtype=torch.bool)
        new = mask.bool() if mask is not None else tokens.new_ones(B, T, dtype=torch.bool)
        self.mask = torch.cat((before, new), dim=1)
        return self.mask


@dataclass(frozen=True)
class Protocol:
    """How a model is given its cache and where it returns it."""

    says: str
    fresh: Callable[[nn.Module, int], Any]  # model, batch size -> state
    given: Callable[[Cache, Tensor], dict[str, Any]]  # arguments of forward for these tokens
    kept: Callable[[Any, Any], Any] | None = None  # output, state before -> state; None: it is changed in place
    declared: bool = True
    given_back: str = ""  # the argument, of a name that only caches have, by which the model takes what it returned
    inside: bool = False
    whole_mask: bool = False  # whether the mask argument covers all tokens so far
    more: Mapping[str, Any] = field(default_factory=dict)

    def new(self, model: nn.Module, batch_size: int) -> Cache:
        return Cache(self, self.fresh(model, batch_size), inside_the_model=self.inside)


def step(forward: Forward, model: nn.Module, tokens: Tensor, cache: Cache, more: Mapping[str, Any]) -> Tensor:
    """Logits of these tokens [B, T, V], or of the last one [B, 1, V] if the model returns no more."""
    protocol = cache.protocol
    output = forward.call.run(model, tokens, **{**protocol.given(cache, tokens), **more})
    if protocol.kept is not None:
        cache.state = protocol.kept(output, cache.state)
    cache.length += tokens.shape[1]
    try:
        return forward.read(output, *tokens.shape)
    except Unreadable:
        return forward.read(output, len(tokens), 1)


def find_protocol(
    forward: Forward, model: nn.Module, sandbox: Sandbox, sizes: Mapping[str, Any], tokens: Tensor
) -> Protocol | None:
    """The protocol that the model follows; None if no known one works."""
    unreadable = None
    for protocol in protocols(model, sandbox, sizes):
        try:
            apart = _apart(forward, model, protocol, tokens)
        except Exception:
            if unreadable is None and protocol.given_back and _gives_back(forward, model, protocol, tokens):
                unreadable = protocol
            continue
        if apart > CLOSE and protocol.given_back and (grown := _grown_outside(forward, model, protocol, tokens)):
            return grown
        if protocol.declared or apart <= CLOSE:
            return protocol
    return unreadable


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
        new = _returned(output, before)
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


def protocols(model: nn.Module, sandbox: Sandbox, sizes: Mapping[str, Any]) -> Iterator[Protocol]:
    """The protocols that the model's signature allows, the surest first."""
    parameters = {vocabulary.squash(p.name): p for p in parameters_of(model)}
    argument = next((p.name for plain, p in parameters.items() if plain in vocabulary.CACHES), None)
    use = next((p.name for plain, p in parameters.items() if plain in ("usecache", "usekvcache", "usekv")), None)
    start = next((p.name for plain, p in parameters.items() if plain in vocabulary.STARTS), None)
    capacity = sizes["block_size"]
    switched = {use: True} if use else {}

    def at(cache: Cache, tokens: Tensor) -> dict[str, Any]:
        return {**switched, **({start: cache.length} if start else {})}

    if argument is not None and callable(maker := getattr(model, "new_cache", None)):
        yield Protocol(
            f"new_cache, {argument}=",
            lambda m, B: _made(maker, B, capacity),
            lambda c, x: {argument: c.state, **at(c, x)},
        )
    if argument is not None:
        yield Protocol(
            f"{argument}=, returned", lambda m, B: None, lambda c, x: {argument: c.state, **at(c, x)},
            kept=_returned, whole_mask=True,
            given_back=argument if ONLY_CACHES.search(vocabulary.squash(argument)) else "",
        )  # fmt: skip
        for cls in _cache_classes(model, sandbox):
            yield Protocol(
                f"{argument}={cls.__name__}()", functools.partial(_filled, cls, sizes),
                lambda c, x: {argument: c.state, **at(c, x)}, declared=False,
            )  # fmt: skip
    reset = next((name for name in RESETS if callable(getattr(model, name, None))), None)
    if use is not None and reset is not None:
        yield Protocol(f"{use}=True, {reset}()", lambda m, B: getattr(m, reset)(), at, inside=True)
    if start is not None:
        yield Protocol(f"{start}=", lambda m, B: None, at, inside=True, declared=False)
    if (place := parameters.get("inputpos")) is not None and callable(getattr(model, "setup_caches", None)):

        def places(cache: Cache, tokens: Tensor) -> dict[str, Any]:
            return {place.name: torch.arange(cache.length, cache.length + tokens.shape[1], device=tokens.device)}

        yield Protocol(
            f"setup_caches, {place.name}=",
            lambda m, B: set_up_caches(m, B, capacity, next(m.parameters()).device, anew=True),
            places,
            inside=True,
            declared=False,
        )


def _made(maker: Callable[..., Any], B: int, capacity: int) -> Any:
    """A cache from the model's own function: for a batch size, and a capacity if it takes one."""
    required = [p for p in inspect.signature(maker).parameters.values() if p.default is p.empty]
    return maker(*(B, capacity)[: max(len(required), 1)])


def _returned(output: Any, before: Any = None) -> Any:
    """The cache in an output: by its name in an object, or whatever is not the logits."""
    if isinstance(output, Mapping):
        return next((output[key] for key in _named_as_a_cache(output) if output[key] is not None), None)
    if isinstance(output, tuple | list):
        logits = next((x for _, x in tensors_in(output)), None)
        return next((item for item in output if item is not None and item is not logits and not _scalar(item)), None)
    if isinstance(output, Tensor):
        return None
    names = _named_as_a_cache([*getattr(type(output), "__annotations__", ()), *getattr(output, "__dict__", ())])
    return next((value for key in names if (value := getattr(output, key, None)) is not None), None)


def _named_as_a_cache(names: Iterable[str]) -> list[str]:
    """Those of the names that a cache has, the surest first."""
    known = [name for name in KEPT if name in names]
    return [*known, *(n for n in names if n not in known and ONLY_CACHES.search(vocabulary.squash(n)))]


def _scalar(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


def _cache_classes(model: nn.Module, sandbox: Sandbox) -> list[type]:
    """Classes with cache in their names that the model's module can see."""
    scope = scope_of(type(model), sandbox)
    return [v for k, v in scope.items() if inspect.isclass(v) and "cache" in k.lower() and sandbox.owns(_file_of(v))]


def _file_of(cls: type) -> str:
    maker = vars(cls).get("__init__")
    return getattr(getattr(maker, "__code__", None), "co_filename", "<frozen")


def _filled(cls: type, sizes: Mapping[str, Any], model: nn.Module, B: int) -> Any:
    signature = signature_of(cls)
    arguments = Filling({**sizes, "padding": None}).arguments(signature)
    rows = {p.name: B for p in signature.parameters if vocabulary.squash(p.name) in vocabulary.BATCH}
    return cls(**{**arguments, **rows})
