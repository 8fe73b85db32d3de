"""The reference with the subject's weights, in the variant of the family that the subject implements.

A variant is a choice that a published family leaves open: the form of GELU, a norm's epsilon, the layout of RoPE.
Any other difference is a bug or a design of its own, and known_bugs.py simulates it.
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
from .weights.roles import Norm, Plan, Value

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # of published models: 1e-5 in GPT-2, 1e-5 and 1e-6 in Llama
USUAL_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those of the training.

    With `original` 0 every frequency is divided by `factor` (linear scaling, Chen et al. 2023). Otherwise as in
    Llama 3.1: wavelengths longer than original / low are divided by the factor, those shorter than original / high
    are kept, and those between are interpolated.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: float = 0.0  # context length of the training, in tokens

    def __str__(self) -> str:
        kind = "as in Llama 3.1" if self.original else "linear scaling"
        return f"RoPE frequencies divided by {self.factor:g} ({kind})"

    def scaled(self, frequencies: Tensor) -> Tensor:
        if not self.original:
            return frequencies / self.factor
        turns = self.original * frequencies / (2 * torch.pi)  # in the original context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


SCALED_BASE = 500_000.0  # of Llama 3.1 and 3.2
USUAL_SCALINGS = (RopeScaling(8.0, original=8192.0), RopeScaling(32.0, original=8192.0))  # Llama 3.1 and 3.2


@dataclass(frozen=True)
class Variant:
    """The choices that a family leaves open, other than sizes, biases and tying."""

    family: str
    positions: str = "learned"
    activation: str = "gelu-tanh"
    eps: tuple[float, ...] = (1e-5,)  # one for all norms; or before attention, before the feed-forward, and final
    rope_base: float = 10_000.0
    mirrored: bool = False  # rotary angles of the opposite sign; other weights make them equivalent
    tiled: bool = False  # query head h reads key-value head h mod G; other weights make them equivalent
    rope_scaling: RopeScaling | None = None
    log_probabilities: bool = False

    def __str__(self) -> str:
        return ", ".join(self.words())

    def words(self) -> list[str]:
        words = []
        if self.family == "gpt2":
            words.append({"gelu-tanh": "tanh GELU", "gelu-exact": "exact GELU"}[self.activation])
        else:
            layout = "rotate-half" if self.positions == "rotary" else "interleaved"
            words.append(f"{layout} RoPE, base {self.rope_base:g}")
            words += [str(self.rope_scaling)] if self.rope_scaling is not None else []
            words += ["RoPE angles negated"] if self.mirrored else []
            words += ["query head h reads key-value head h mod G"] if self.tiled else []
        words.append(f"epsilon {', '.join(f'{eps:.3g}' for eps in dict.fromkeys(self.eps))}")
        return words + (["log-probabilities"] if self.log_probabilities else [])


def family_config(plan: Plan, variant: Variant) -> dict[str, Any]:
    """The fields of ModelConfig for the sizes of this plan and the parts of this variant."""
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
    """The reference with the subject's weights. Biases that the subject lacks are zero, gains are one."""
    with uninitialized():
        model = Transformer(ModelConfig(**family_config(plan, variant)))
    return vary(load(model, plan, value), variant)


class _SkipInitialization(TorchFunctionMode):
    """Leaves weights undrawn that are overwritten later anyway."""

    DRAWING = ("normal_", "uniform_", "kaiming_uniform_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" and func.__name__ in self.DRAWING:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextlib.contextmanager
def uninitialized() -> Iterator[None]:
    """Inside, models are built in float64 and their weights hold arbitrary numbers. Restores the random state.

    `fork_rng` would take as long as building the model.
    """
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.default_generator.manual_seed(0)
    try:
        with _SkipInitialization():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


def load(model: Transformer, plan: Plan, value: Value = lambda w: w.tensor.detach()) -> Transformer:
    """Copies the subject's weights into a reference, damaged or not. Parts that the damage removed stay removed."""
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


def norms_of(plan: Plan) -> dict[str, Norm | None]:
    """By the names of the reference: the norms of a block, and the final one."""
    return {
        "attention_norm": plan.attention_norm,
        "feed_forward_norm": plan.feed_forward_norm,
        "norm": plan.final_norm,
    }


def vary(model: Transformer, variant: Variant) -> Transformer:
    """Turns the reference into the variant by changing the classes of some parts. A damaged part keeps its damage."""
    eps = variant.eps * 3 if len(variant.eps) == 1 else variant.eps
    set_eps(model.norm, eps[0], eps[2])
    for block in cast(Iterable[Block], model.blocks):
        set_eps(block.attention_norm, eps[0], eps[0])
        set_eps(block.feed_forward_norm, eps[0], eps[1])
        if variant.activation == "gelu-exact":
            override(block.feed_forward, GeluFeedForward, activation=lambda self, x: F.gelu(x))
        if variant.tiled:
            override(block.attention, Attention, share=tiled)
    if variant.mirrored or variant.rope_scaling is not None:
        override(model.positions, RotaryPositions, angles=angles(variant))
    if variant.log_probabilities:
        override(model, Transformer, forward=log_probabilities)
    return model


def set_eps(norm: Any, built: float, eps: float) -> None:
    """Sets the epsilon, unless damage has changed it from the one that the norm was built with."""
    if getattr(norm, "eps", None) == built:
        norm.eps = eps


def override(module: nn.Module, kind: type, **methods: Any) -> None:
    """Gives a module other methods, except where damage has already replaced them."""
    mine = type(module)
    methods = {name: new for name, new in methods.items() if getattr(mine, name, None) is getattr(kind, name)}
    if methods:
        module.__class__ = type(mine.__name__, (mine,), methods)


def tiled(self: Attention, x: Tensor) -> Tensor:
    return x.repeat(1, self.n_head // self.n_kv_head, 1, 1)


def angles(variant: Variant) -> Any:
    """A replacement for `RotaryPositions.angles` with the variant's sign and scaling."""

    def of(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        frequencies = RotaryPositions.angles(self, torch.ones_like(positions[..., :1]), dtype)
        if variant.rope_scaling is not None:
            frequencies = variant.rope_scaling.scaled(frequencies)
        return positions[..., None] * (-frequencies if variant.mirrored else frequencies)

    return of


def log_probabilities(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
    return Transformer.forward(self, *args, **kwargs).log_softmax(-1)


def variants(
    family: str,
    eps: list[tuple[float, ...]],
    bases: tuple[float, ...],
    grouped: bool,
    scalings: tuple[RopeScaling, ...],
) -> list[Variant]:
    """Every variant of a family, the usual ones first. RoPE scaling only with the likeliest base and Llama 3.1's."""
    if family == "gpt2":
        return [Variant("gpt2", activation=a, eps=e) for e in eps for a in ("gelu-tanh", "gelu-exact")]
    return [
        Variant("llama", p, "silu", e, b, mirrored=m, tiled=t, rope_scaling=s)
        for b, s in (*product(bases, [None]), *product(dict.fromkeys((bases[0], SCALED_BASE)), scalings))
        for m in (False, True)
        for t in ((False, True) if grouped else (False,))
        for e in eps
        for p in ("rotary", "rotary-interleaved")
    ]
