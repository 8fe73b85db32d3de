"""The reference with a subject's weights in it, in the variant of the family that the subject is.

A variant is what a published family leaves open; what goes beyond it is a design or a bug, and is simulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...transformer.model import Attention, Block, GeluFeedForward, ModelConfig, RotaryPositions, Transformer
from .weights.roles import Plan, Value

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # those of published models; 1e-5 in GPT-2, 1e-5 and 1e-6 in Llama
USUAL_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)


@dataclass(frozen=True)
class Stretch:
    """How rotary frequencies are stretched for contexts longer than those of the training.

    With `original` 0 all are divided by `factor` (Chen et al. 2023); else as Llama 3.1 does: those of wavelengths
    longer than original / low, none of those shorter than original / high, and between them part of it.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: float = 0.0

    def __str__(self) -> str:
        way = "as Llama 3.1's" if self.original else "all alike"
        return f"frequencies stretched {self.factor:g} times, {way}"

    def of(self, frequencies: Tensor) -> Tensor:
        if not self.original:
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * torch.pi)  # in the original context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


STRETCHED_BASE = 500_000.0
USUAL_STRETCHES = (Stretch(8.0, original=8192.0), Stretch(32.0, original=8192.0))  # Llama 3.1 and 3.2


@dataclass(frozen=True)
class Variant:
    """Which GPT-2 or Llama it is, beyond sizes, biases and tying."""

    family: str
    positions: str = "learned"
    activation: str = "gelu-tanh"
    eps: tuple[float, ...] = (1e-5,)  # one for all norms, or attention's, feed-forward's and final
    rope_base: float = 10_000.0
    mirrored: bool = False  # rotary angles of the opposite sign: the same family of models
    tiled: bool = False  # query head h reads key-value head h mod G: the same family of models
    stretch: Stretch | None = None  # of rotary frequencies
    log_probabilities: bool = False

    def __str__(self) -> str:
        return ", ".join(self.words())

    def words(self) -> list[str]:
        said = []
        if self.family == "gpt2":
            said.append({"gelu-tanh": "tanh GELU", "gelu-exact": "exact GELU"}[self.activation])
        else:
            layout = "halves" if self.positions == "rotary" else "interleaved pairs"
            said.append(f"rotary positions in {layout}, base {self.rope_base:g}")
            said += [str(self.stretch)] if self.stretch is not None else []
            said += ["rotating backwards"] if self.mirrored else []
            said += ["tiled key-value heads"] if self.tiled else []
        said.append(f"epsilon {', '.join(f'{eps:.3g}' for eps in dict.fromkeys(self.eps))}")
        return said + (["log-probabilities"] if self.log_probabilities else [])


def family_config(plan: Plan, variant: Variant) -> dict[str, Any]:
    """The fields of ModelConfig that make the reference this plan's and this variant's."""
    shape, width = plan.shape, plan.shape.n_embd
    table = plan.positions.numel // width if plan.positions is not None else shape.block_size
    parts = (
        dict(positions="learned", norm="layer", feed_forward="gelu")
        if variant.family == "gpt2"
        else dict(positions=variant.positions, norm="rms", feed_forward="swiglu")
    )
    return dict(
        vocab_size=plan.embedding.numel // width, block_size=table, n_layer=len(plan.inventory.layers),
        n_head=shape.n_head, n_embd=width, n_kv_head=plan.n_kv_head, n_hidden=plan.hidden, bias=True,
        tied=plan.tied, norm_eps=variant.eps[0], rope_base=variant.rope_base, **parts,
    )  # fmt: skip


def build(plan: Plan, variant: Variant, value: Value = lambda w: w.tensor.detach()) -> Transformer:
    """The reference with their weights; what they lack is a zero bias or a gain of one."""
    with undrawn():
        model = Transformer(ModelConfig(**family_config(plan, variant)))
    return vary(load(model, plan, value), variant)


class _Undrawn(TorchFunctionMode):
    """Weights that are filled later need not be drawn now."""

    DRAWING = ("normal_", "uniform_", "kaiming_uniform_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and func.__name__ in self.DRAWING:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Inside, models are built in float64 with weights that hold anything; the random state is then as it was.

    `fork_rng` would take as long as the building.
    """
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.default_generator.manual_seed(0)
    try:
        with _Undrawn():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def load(model: Transformer, plan: Plan, value: Value = lambda w: w.tensor.detach()) -> Transformer:
    """Their weights into a reference, damaged or not; parts that damage took away stay away."""
    theirs = plan.state(value)
    for name, norm in norms_of(plan).items():
        if norm is not None and norm.minus_one:
            theirs.update({k: t + 1 for k, t in theirs.items() if k.split(".")[-2:] == [name, "weight"]})
    model.to(theirs["embedding.weight"])
    bias = theirs.pop("head.bias", None)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in theirs and tensor.shape == theirs[name].shape:
                tensor.copy_(theirs[name])
            elif not name.endswith("norm.weight"):
                tensor.zero_()
    if bias is not None:
        model.head.bias = nn.Parameter(bias.clone())
    return model.eval()


def norms_of(plan: Plan) -> dict[str, Any]:
    return {
        "attention_norm": plan.attention_norm,
        "feed_forward_norm": plan.feed_forward_norm,
        "norm": plan.final_norm,
    }


def vary(model: Transformer, variant: Variant) -> Transformer:
    """Makes the reference the variant, by the class of the part that differs; a damaged part keeps its damage."""
    eps = variant.eps * 3 if len(variant.eps) == 1 else variant.eps
    set_eps(model.norm, eps[0], eps[2])
    for block in cast(Iterable[Block], model.blocks):
        set_eps(block.attention_norm, eps[0], eps[0])
        set_eps(block.feed_forward_norm, eps[0], eps[1])
        if variant.activation == "gelu-exact":
            override(block.feed_forward, GeluFeedForward, activation=lambda self, x: F.gelu(x))
        if variant.tiled:
            override(block.attention, Attention, share=tiled)
    if variant.mirrored or variant.stretch is not None:
        override(model.positions, RotaryPositions, angles=angles(variant))
    if variant.log_probabilities:
        override(model, Transformer, forward=log_probabilities)
    return model


def set_eps(norm: Any, built: float, eps: float) -> None:
    """Another epsilon than it was built with, unless damage has changed it."""
    if getattr(norm, "eps", None) == built:
        norm.eps = eps


def override(module: nn.Module, kind: type, **methods: Any) -> None:
    """Gives a module other methods, unless it is damaged in just these."""
    mine = type(module)
    methods = {name: new for name, new in methods.items() if getattr(mine, name, None) is getattr(kind, name)}
    if methods:
        module.__class__ = type(mine.__name__, (mine,), methods)


def tiled(self: Attention, x: Tensor) -> Tensor:
    return x.repeat(1, self.n_head // self.n_kv_head, 1, 1)


def angles(variant: Variant) -> Any:
    """Of positions [..., T], as `RotaryPositions.angles`, in the variant's direction and stretched as it is."""

    def of(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        frequencies = RotaryPositions.angles(self, torch.ones_like(positions[..., :1]), dtype)
        if variant.stretch is not None:
            frequencies = variant.stretch.of(frequencies)
        return positions[..., None] * (-frequencies if variant.mirrored else frequencies)

    return of


def log_probabilities(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
    return Transformer.forward(self, *args, **kwargs).log_softmax(-1)


def variants(
    family: str, eps: list[tuple[float, ...]], bases: tuple[float, ...], grouped: bool, stretches: tuple[Stretch, ...]
) -> list[Variant]:
    """Every variant of a family, the usual ones first; stretched frequencies only of the likeliest base and 3.1's."""
    if family == "gpt2":
        return [Variant("gpt2", activation=a, eps=e) for e in eps for a in ("gelu-tanh", "gelu-exact")]
    return [
        Variant("llama", p, "silu", e, b, mirrored=m, tiled=t, stretch=s)
        for b, s in (*product(bases, [None]), *product(dict.fromkeys((bases[0], STRETCHED_BASE)), stretches))
        for m in (False, True)
        for t in ((False, True) if grouped else (False,))
        for e in eps
        for p in ("rotary", "rotary-interleaved")
    ]
