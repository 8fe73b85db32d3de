"""How bugs damage the reference: other classes for its parts, other methods, other functions of decoding."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...transformer import generation
from ...transformer.model import Attention, Block, Transformer
from .designs import a_step

# What the reference must be for a bug to matter
GPT2: dict[str, Any] = dict(spec="gpt2")
GELU: dict[str, Any] = dict(GPT2, feed_forward="gelu")  # for what a gate does not have
EXPLICIT: dict[str, Any] = dict(GPT2, attention="explicit")  # for what the fused kernel does not show
LLAMA: dict[str, Any] = dict(
    spec="llama", positions="rotary", norm="rms", feed_forward="swiglu", bias=False, tied=False, norm_eps=1e-6
)


# -- a model


def blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def norms(model: Transformer) -> list[nn.LayerNorm | nn.RMSNorm]:
    """All of them, the final one last."""
    return [*block_norms(model), model.norm]


def block_norms(model: Transformer) -> list[nn.LayerNorm | nn.RMSNorm]:
    return [norm for block in blocks(model) for norm in (block.attention_norm, block.feed_forward_norm)]


def attend_with(model: Transformer, kind: type[Attention], layers: slice = slice(None)) -> None:
    """Makes the attention of these layers of another class."""
    for block in blocks(model)[layers]:
        block.attention.__class__ = kind


def redefine(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """Gives one module other methods, by a class of its own."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)


def undamaged(attention: Attention) -> type[Attention]:
    """The class whose methods `redefine` has replaced."""
    return cast(type[Attention], type(attention).__mro__[1])


# -- decoding


def decode_with(parts: SimpleNamespace, **functions: Callable[..., Any]) -> None:
    """Replaces some of the small functions of the reference's decoding."""
    parts.generate = decoding(**functions).generate


def decoding(**replaced: Callable[..., Any]) -> ModuleType:
    """The reference's decoding afresh, some of its functions replaced."""
    spec = importlib.util.spec_from_file_location("damaged_generation", generation.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(replaced)
    return module


def generate_with(parts: SimpleNamespace, change: Callable[..., Tensor]) -> None:
    """`change(generate, model, prompt, max_new_tokens, **options)` in the place of generate."""

    @functools.wraps(generation.generate)
    def generate(model: nn.Module, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        return change(generation.generate, model, prompt, max_new_tokens, **options)

    parts.generate = generate


# -- a train_step without a trainer


def step_with(parts: SimpleNamespace, **how: Any) -> None:
    """A train_step that differs from the right one by options of `a_step`."""

    def train_step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: tuple[Tensor, Tensor],
        scheduler: Any = None,
        scaler: Any = None,
        max_norm: float | None = None,
    ) -> float:
        return a_step(model, optimizer, batch, scheduler, scaler, max_norm, **how)

    parts.train_step = train_step


def step_around(parts: SimpleNamespace, change: Callable[..., float]) -> None:
    """`change(step, model, optimizer, batch, scheduler)`, where `step` takes the same again."""

    def train_step(
        model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], scheduler: Any = None
    ) -> float:
        def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, scheduler: Any) -> float:
            return a_step(model, optimizer, batch, scheduler, None, None)

        return change(step, model, optimizer, batch, scheduler)

    parts.train_step = train_step
