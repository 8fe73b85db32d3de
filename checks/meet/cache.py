"""A model's key-value cache: the usual protocols that its parameters' names allow, and how one is followed.

meet/cache_search.py tries them.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import vocabulary
from .arguments import Filling, signature_of
from .build import scope_of
from .call_forms import parameters_of, set_up_caches
from .forward import Forward
from .logits import Unreadable, tensors_in
from .sandbox import Sandbox
from .sizes import sizes_of

RESETS = ("reset_kv_cache", "reset_cache", "clear_cache", "clear_kv_cache", "empty_cache", "reset_caches", "reset")
KEPT = ("past_key_values", "kv_cache", "cache", "past", "presents", "state", "mems")
USES = ("usecache", "usekvcache", "usekv")
ONLY_CACHES = re.compile("cache|past|present|kv")  # a state or a memory may be something else


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


def protocols(model: nn.Module, sandbox: Sandbox, sizes: Mapping[str, Any]) -> Iterator[Protocol]:
    """The protocols that the model's signature allows, the surest first."""
    parameters = {vocabulary.squash(p.name): p for p in parameters_of(model)}
    argument = next((p.name for plain, p in parameters.items() if plain in vocabulary.CACHES), None)
    use = next((p.name for plain, p in parameters.items() if plain in USES), None)
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
            kept=returned, whole_mask=True,
            given_back=argument if ONLY_CACHES.search(vocabulary.squash(argument)) else "",
        )  # fmt: skip
        for cls in cache_classes(model, sandbox):
            one = functools.partial(_filled, cls, sizes)
            for says, fresh in (
                (f"{cls.__name__}()", one),
                (f"[{cls.__name__}(), …]", functools.partial(_of_each_block, one)),
            ):
                yield Protocol(
                    f"{argument}={says}", fresh, lambda c, x: {argument: c.state, **at(c, x)}, declared=False
                )
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


def returned(output: Any, before: Any = None) -> Any:
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


def cache_classes(model: nn.Module, sandbox: Sandbox) -> list[type]:
    """Classes with cache in their names that the model's module can see."""
    scope = scope_of(type(model), sandbox)
    return [v for k, v in scope.items() if inspect.isclass(v) and "cache" in k.lower() and sandbox.owns(_file_of(v))]


def _file_of(cls: type) -> str:
    maker = vars(cls).get("__init__")
    return getattr(getattr(maker, "__code__", None), "co_filename", "<frozen")


def _filled(cls: type, sizes: Mapping[str, Any], model: nn.Module, B: int) -> Any:
    """A cache of this class for the model: of its type and on its device, named by arguments or not."""
    signature = signature_of(cls)
    arguments = Filling({**sizes, "padding": None}).arguments(signature)
    rows = {p.name: B for p in signature.parameters if vocabulary.squash(p.name) in vocabulary.BATCH}
    weight = next((x for x in model.parameters() if x.is_floating_point()), torch.empty(0))
    own = {"dtype": weight.dtype, "device": weight.device}
    named = {p.name: vocabulary.squash(p.name) for p in signature.parameters if not isinstance(p.default, str)}
    kind = {name: own[plain] for name, plain in named.items() if plain in own}
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        return cls(**{**arguments, **rows, **kind})
    finally:
        torch.set_default_dtype(before)


def _of_each_block(one: Callable[[nn.Module, int], Any], model: nn.Module, B: int) -> list[Any]:
    return [one(model, B) for _ in range(sizes_of(model)["n_layer"] or 1)]
