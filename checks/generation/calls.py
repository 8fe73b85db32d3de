"""The calls that a generate makes of its model: recorded, with the logits that it gets replaced on the way.

Also how many autograd graphs are alive while it runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..watch.calls import each
from .met_generate import NAMES, Decoder

# Logits [..., V] and the tokens they follow, if known, to logits of the same shape.
Script = Callable[[Tensor, Tensor | None], Tensor]

CACHES = {"cache", "past_key_values", "past_kv", "past_kvs", "kv_cache", "kv_caches", "layer_past", "past", "input_pos"}


@dataclass
class Read:
    """One call of the model by a generate: the tokens it was given and the logits that came back, after the script."""

    tokens: Tensor | None  # [B, T]
    logits: Tensor  # [B, T or 1, V]
    cached: bool  # whether an argument looks like a cache
    masked: bool  # whether an argument looks like a padding mask
    training: bool  # whether any module was in train mode


def find_logits_module(model: nn.Module, calls: Decoder, V: int) -> tuple[str, bool]:
    """The outermost module whose forward returns logits while generate runs, and whether it is given token ids.

    A generate may call the model's parts one by one: its head, then, is given vectors.
    """
    depth = 0
    given: dict[str, bool] = {}
    found: dict[str, int] = {}

    def wrap(name: str, module: nn.Module) -> None:
        forward = module.forward

        @functools.wraps(forward)  # a generate may look up which arguments its model's forward takes: positions, a mask
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                answer = forward(*args, **kwargs)
            finally:
                depth -= 1
            if find_logits(answer, V) is not None:
                found[name] = min(depth, found.get(name, depth))
                given[name] = read_tokens(args, kwargs) is not None
            return answer

        module.__dict__["forward"] = wrapped

    modules = list(model.named_modules())
    try:
        for name, module in modules:
            wrap(name, module)
        calls(model, [[0, 1]], 2)
    finally:
        for _, module in modules:
            module.__dict__.pop("forward", None)
    if not found:
        raise NotApplicable(f"{calls.name} calls no module of your model that returns logits")
    outermost = min(found, key=lambda name: found[name])
    return outermost, given[outermost]


@contextmanager
def watched(model: nn.Module, name: str, V: int, script: Script) -> Iterator[list[Read]]:
    """Records the calls of the named module, and passes the logits that it returns through the script."""
    reads: list[Read] = []
    module = model.get_submodule(name)
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        tokens, scripted = read_tokens(args, kwargs), torch.empty(0)

        def change(logits: Tensor) -> Tensor:
            nonlocal scripted
            scripted = script(logits, tokens)
            return scripted + 0 * logits.nan_to_num() if logits.requires_grad else scripted

        answer = replace_logits(answer, V, change)
        cached = any(value is not None and name in CACHES for name, value in kwargs.items())
        masked = any(value is not None and name in NAMES["mask"] for name, value in kwargs.items())
        masked = masked or any(isinstance(value, Tensor) and value.dim() > 1 for value in args[1:])
        reads.append(Read(tokens, scripted, cached, masked, any(m.training for m in model.modules())))
        return answer

    module.__dict__["forward"] = wrapped
    try:
        yield reads
    finally:
        module.__dict__.pop("forward", None)


def cached(reads: list[Read]) -> bool:
    """Whether the calls went through a cache: one was passed in, or single tokens followed longer texts."""
    lengths = [read.tokens.shape[-1] for read in reads if read.tokens is not None]
    return any(read.cached for read in reads) or (len(lengths) > 1 and lengths[0] > 1 and set(lengths[1:]) == {1})


def fed(reads: list[Read]) -> int:
    """How many tokens these calls had put into a cache."""
    return sum(read.tokens.shape[-1] for read in reads if read.cached and read.tokens is not None)


@contextmanager
def graphs(model: nn.Module) -> Iterator[list[int]]:
    """At each call of the first embedding: how many autograd graphs of such calls are alive."""
    alive: list[int] = []
    held: weakref.WeakSet[Sentinel] = weakref.WeakSet()
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)][:1]

    def wrap(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def wrapped(tokens: Tensor) -> Tensor:
            vectors = forward(tokens)
            marked: Tensor = Marked.apply(vectors, held) if vectors.requires_grad else vectors  # type: ignore[no-untyped-call]
            alive.append(len(held))
            return marked

        return wrapped

    for table in tables:
        table.__dict__["forward"] = wrap(table.forward)
    try:
        yield alive
    finally:
        for table in tables:
            table.__dict__.pop("forward", None)


class Sentinel:
    """Lives as long as the autograd graph that holds it."""


class Marked(torch.autograd.Function):
    """The identity, with a sentinel in its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: weakref.WeakSet[Sentinel]) -> Tensor:
        ctx.sentinel = Sentinel()
        held.add(ctx.sentinel)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def read_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The token ids among the arguments of a call: the first integer tensor, or one of a usual name."""
    named = [kwargs[name] for name in NAMES["prompt"] if name in kwargs]
    for value in (*args, *named):
        if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() in (1, 2):
            return value.detach().clone()
    return None


def find_logits(answer: Any, V: int) -> Tensor | None:
    """The first floating-point tensor [..., V] in what a module returned."""
    found: list[Tensor] = []

    def take(logits: Tensor) -> Tensor:
        found.append(logits)
        return logits

    replace_logits(answer, V, take)
    return found[0] if found else None


def replace_logits(answer: Any, V: int, change: Callable[[Tensor], Tensor]) -> Any:
    """What a module returned, with its logits changed: those of that name, or the first floats [..., V] in it."""
    named = answer.get("logits") if isinstance(answer, dict) else getattr(answer, "logits", None)
    changed = False

    def first(item: Tensor) -> Tensor:
        nonlocal changed
        if changed or (isinstance(named, Tensor) and item is not named):
            return item
        if not item.is_floating_point() or item.dim() == 0 or item.shape[-1] != V:
            return item
        changed = True
        return change(item)

    return each(answer, first)
