"""The reference with a subject's weights in it, in the variant of the family that the subject is.

A variant is what a published family leaves open; what goes beyond it is a design or a bug, and is simulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checks.spec.roles import Plan, Value
from transformer.model import Attention, Block, GeluFeedForward, ModelConfig, RotaryPositions, Transformer

USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # those of published models; 1e-5 in GPT-2, 1e-5 and 1e-6 in Llama
USUAL_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0)


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
    with torch.random.fork_rng(devices=[]):
        model = Transformer(ModelConfig(**family_config(plan, variant)))
    return vary(load(model, plan, value), variant)


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
            elif name.endswith("bias"):
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
    if variant.mirrored:
        override(model.positions, RotaryPositions, angles=mirrored)
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


def mirrored(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
    return -RotaryPositions.angles(self, positions, dtype)


def log_probabilities(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
    return Transformer.forward(self, *args, **kwargs).log_softmax(-1)


def variants(family: str, eps: list[tuple[float, ...]], bases: tuple[float, ...], grouped: bool) -> list[Variant]:
    """Every variant of a family, the usual ones first."""
    if family == "gpt2":
        return [Variant("gpt2", activation=a, eps=e) for e in eps for a in ("gelu-tanh", "gelu-exact")]
    return [
        Variant("llama", p, "silu", e, b, mirrored=m, tiled=t)
        for b in bases
        for m in (False, True)
        for t in ((False, True) if grouped else (False,))
        for e in eps
        for p in ("rotary", "rotary-interleaved")
    ]
