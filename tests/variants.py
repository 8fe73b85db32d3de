"""Correct variants of the reference: each one design choice that must not fail any check."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.controls import CONTROLS, Called
from transformer_checks.checks.bugs.designs import (
    BalancedTransformer,
    Experts,
    StackedExperts,
    StochasticBlock,
    changed,
)
from transformer_checks.checks.bugs.targets import LooksFromOnePlace, LooksFurther
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import (
    Block,
    GeluFeedForward,
    SwigluFeedForward,
    Transformer,
)


def variant(name: str, *, cache: bool = True, causal: bool = True, **config: Any) -> Callable:
    """Adds a variant made by changing the built model. `cache=False`: it has no cache; `causal`: what is declared."""

    def mark(change: Callable[[Transformer], None]) -> Callable:
        def make(**declared: Any) -> Subject:
            parts, declared = changed(change, **config), {"causal": causal, **declared}
            if cache:
                return Subject(name, parts, **declared)
            build = parts.build_model
            return Called(name, build, lambda model, tokens, mask: model(tokens, mask), mask=True, **declared)

        CONTROLS[name] = make
        return change

    return mark


def blocks(model: Transformer) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def swap(modules: Any, kind: type) -> None:
    for module in modules:
        module.__class__ = kind


def attentions(model: Transformer) -> list[Any]:
    return [block.attention for block in blocks(model)]


def feed_forwards(model: Transformer) -> list[Any]:
    return [block.feed_forward for block in blocks(model)]


LLAMA = dict(positions="rotary", norm="rms", feed_forward="swiglu", bias=False, tied=False, norm_eps=1e-6)

for name, config in {
    "reference-gpt2": {},
    "reference-gpt2-explicit": dict(attention="explicit"),
    "reference-llama": LLAMA,
    "reference-llama-explicit": dict(LLAMA, attention="explicit"),
    "grouped": dict(LLAMA, n_kv_head=2),
    "one-key-value-head": dict(LLAMA, n_kv_head=1),
    "rotary-interleaved": dict(LLAMA, positions="rotary-interleaved"),
    "tied-rotary": dict(positions="rotary"),
}.items():
    variant(name, **config)(lambda model: None)


# -- blocks


@variant("post-norm")
def post_norm(model: Transformer) -> None:
    class After(Block):
        def forward(self, x: Tensor, rotate: Any, visible: Tensor | None, cache: Any) -> Tensor:
            x = self.attention_norm(self.residual(x, self.attention(x, rotate, visible, cache)))
            return self.feed_forward_norm(self.residual(x, self.feed_forward(x)))

    swap(model.blocks, After)
    model.norm = nn.Identity()


@variant("post-norm-with-scaled-embeddings", tied=False)
def post_norm_scaled(model: Transformer) -> None:
    post_norm(model)
    scaled_embeddings(model)


@variant("parallel-blocks")
def parallel_blocks(model: Transformer) -> None:
    class Parallel(Block):
        def forward(self, x: Tensor, rotate: Any, visible: Tensor | None, cache: Any) -> Tensor:
            y = self.attention_norm(x)
            return self.residual(x, self.attention(y, rotate, visible, cache) + self.feed_forward(y))

    swap(model.blocks, Parallel)
    for block in blocks(model):
        del block.feed_forward_norm


@variant("shared-layers", cache=False)
def shared_layers(model: Transformer) -> None:
    model.blocks = nn.ModuleList([model.blocks[0]] * len(model.blocks))


@variant("stochastic-depth-by-rows")
def stochastic_depth_by_rows(model: Transformer) -> None:
    swap(model.blocks, StochasticBlock)


@variant("stochastic-depth-by-rows-scaled-in-evaluation")
def stochastic_depth_by_rows_scaled_in_evaluation(model: Transformer) -> None:
    """As in Huang et al. 2016."""

    class ScaledDown(StochasticBlock):
        def scale(self) -> float:
            return 1.0 if self.training else 1 - self.left_out

    swap(model.blocks, ScaledDown)


@variant("residual-gates-from-zero")
def residual_gates(model: Transformer) -> None:
    class Gated(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + self.gate * self.dropout(update)

    for block in blocks(model):
        block.__class__ = Gated
        block.gate = nn.Parameter(torch.zeros(()))


@variant("stochastic-depth")
def stochastic_depth(model: Transformer) -> None:
    class Skipping(Block):
        def forward(self, x: Tensor, rotate: Any, visible: Tensor | None, cache: Any) -> Tensor:
            if self.training and torch.rand(()) < 0.2:
                return x
            return super().forward(x, rotate, visible, cache)

    swap(model.blocks, Skipping)


@variant("activation-checkpointing")
def activation_checkpointing(model: Transformer) -> None:
    class Recomputed(Block):
        def forward(self, x: Tensor, rotate: Any, visible: Tensor | None, cache: Any) -> Tensor:
            if not self.training:
                return super().forward(x, rotate, visible, cache)
            return checkpoint(super().forward, x, rotate, visible, cache, use_reentrant=False)

    swap(model.blocks, Recomputed)


# -- norms and feed-forward


@variant("gain-of-one-plus-weight", **LLAMA)
def one_plus_weight(model: Transformer) -> None:
    class OnePlus(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            normed = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + (self.eps or 0.0))
            return (normed * (1 + self.weight.to(normed))).to(x)

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.__class__ = OnePlus
            nn.init.zeros_(module.weight)


@variant("norm-without-upcast", **LLAMA)
def norm_without_upcast(model: Transformer) -> None:
    class Plain(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.eps or 0.0)) * self.weight

    swap([module for module in model.modules() if isinstance(module, nn.RMSNorm)], Plain)


@variant("layer-norm-by-unbiased-deviation")
def unbiased_deviation(model: Transformer) -> None:
    class Unbiased(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias

    swap([module for module in model.modules() if isinstance(module, nn.LayerNorm)], Unbiased)


@variant("squared-relu")
def squared_relu(model: Transformer) -> None:
    class Squared(GeluFeedForward):
        def activation(self, x: Tensor) -> Tensor:
            return F.relu(x).square()

    swap(feed_forwards(model), Squared)


@variant("gate-and-value-swapped", **LLAMA)
def swapped_gate(model: Transformer) -> None:
    class Swapped(SwigluFeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.gate(x) * self.activation(self.input(x)))

    swap(feed_forwards(model), Swapped)


@variant("experts-of-one")
def experts_of_one(model: Transformer) -> None:
    """Mixture of experts, top 1: each token uses the expert with the highest router probability, scaled by it."""

    class Experts(nn.Module):
        def __init__(self, dense: GeluFeedForward) -> None:
            super().__init__()
            width = dense.input.in_features
            self.router = nn.Linear(width, 4, bias=False)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(4)
            )
            self.output = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            weight, chosen = self.router(x).softmax(-1).max(-1)
            mixed = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                there = chosen == index
                mixed[there] = expert(x[there])
            return self.output(weight[..., None] * mixed)

    for block in blocks(model):
        block.feed_forward = Experts(block.feed_forward)


@variant("experts-in-stacked-weights")
def experts_in_stacked_weights(model: Transformer) -> None:
    """Mixture of experts, two for each token: one tensor per weight, with biases."""
    for block in blocks(model):
        block.feed_forward = StackedExperts(model.config.n_embd)


@variant("experts-balanced-by-the-loss")
def experts_balanced_by_the_loss(model: Transformer) -> None:
    """Mixture of experts whose forward adds a balance loss to the cross entropy of the targets that it is given."""
    for block in blocks(model):
        block.feed_forward = Experts(model.config.n_embd)
    model.__class__ = BalancedTransformer


@variant("ternary-weights", **LLAMA)
def ternary_weights(model: Transformer) -> None:
    """Straight-through estimator: rounded weights in the forward pass, gradients for the unrounded weights."""

    class Ternary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            size = self.weight.abs().mean()
            rounded = (self.weight / size).round().clamp(-1, 1) * size
            return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    swap([m for block in model.blocks for m in block.modules() if type(m) is nn.Linear], Ternary)


# -- embedding and output head


@variant("scaled-embeddings", tied=False)
def scaled_embeddings(model: Transformer) -> None:
    class Scaled(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens) * math.sqrt(self.config.n_embd)

    model.__class__ = Scaled


@variant("logit-softcap")
def logit_softcap(model: Transformer) -> None:
    class Capped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 30 * (super().forward(x) / 30).tanh()

    model.head.__class__ = Capped


@variant("head-from-zero", tied=False)
def head_from_zero(model: Transformer) -> None:
    nn.init.zeros_(model.head.weight)


@variant("projections-from-zero")
def projections_from_zero(model: Transformer) -> None:
    for block in blocks(model):
        nn.init.zeros_(block.attention.output.weight)
        nn.init.zeros_(block.feed_forward.output.weight)


def log_probabilities(model: Transformer, times: int) -> None:
    class Normalized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            for _ in range(times):
                logits = logits.log_softmax(-1)
            return logits

    model.head.__class__ = Normalized


variant("log-probabilities")(functools.partial(log_probabilities, times=1))
variant("log-softmax-twice")(functools.partial(log_probabilities, times=2))


@variant("padding-gives-zeros")
def padding_gives_zeros(model: Transformer) -> None:
    class Zeros(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
            logits = super().forward(tokens, mask, cache)
            return logits if mask is None else logits * mask.bool()[..., None]

    model.__class__ = Zeros


@variant("frozen-embedding", tied=False)
def frozen_embedding(model: Transformer) -> None:
    model.embedding.weight.requires_grad_(False)


@variant("embedding-of-limited-norm", tied=False)
def limited_norm(model: Transformer) -> None:
    model.embedding.max_norm = 1.0


# -- more predictions than the next token, for the training loss alone


@variant("second-head-reads-the-next-token", cache=False)
def second_head_reads_the_next_token(model):
    model.__class__ = LooksFurther


@variant("second-head-from-one-place", cache=False)
def second_head_from_one_place(model):
    model.__class__ = LooksFromOnePlace
