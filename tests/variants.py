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
    PartedTransformer,
    StackedExperts,
    StochasticBlock,
    changed,
)
from transformer_checks.checks.bugs.targets import LooksFromOnePlace, LooksFurther
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import (
    Attention,
    Block,
    ExplicitAttention,
    GeluFeedForward,
    LearnedPositions,
    RotaryPositions,
    SwigluFeedForward,
    Transformer,
    causal_mask,
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


# -- positions


@variant("no-positions")
def no_positions(model: Transformer) -> None:
    class Nowhere(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return x

    model.positions.__class__ = Nowhere
    del model.positions.table


def slopes(heads: int) -> Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def with_linear_bias(model: Transformer, constant: float) -> None:
    class Linear(ExplicitAttention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            T, S = q.shape[2], k.shape[2]
            distance = torch.arange(S, device=q.device) - torch.arange(S - T, S, device=q.device)[:, None]
            return super().scores(q, k) + self.slopes[:, None, None] * distance + constant

    no_positions(model)
    for attention in attentions(model):
        attention.__class__ = Linear
        attention.register_buffer("slopes", slopes(attention.n_head))


@variant("alibi", attention="explicit")
def alibi(model: Transformer) -> None:
    with_linear_bias(model, 0.0)


@variant("alibi-plus-a-constant", attention="explicit")
def alibi_plus_a_constant(model: Transformer) -> None:
    with_linear_bias(model, 3.0)


@variant("sinusoidal")
def sinusoidal(model: Transformer) -> None:
    class Waves(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + self.waves[positions]

    T, C = model.config.block_size, model.config.n_embd
    angles = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, C, 2) / C)
    model.positions.__class__ = Waves
    del model.positions.table
    model.positions.register_buffer("waves", torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1))


@variant("rotary-positions-plus-one", **LLAMA)
def rotary_plus_one(model: Transformer) -> None:
    class PlusOne(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return super().angles(positions + 1, dtype)

    model.positions.__class__ = PlusOne


@variant("rotary-table-made-on-first-use", **LLAMA)
def rotary_table_on_first_use(model: Transformer) -> None:
    class Cached(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            if not hasattr(self, "table"):
                every = torch.arange(model.config.block_size, device=positions.device)
                self.register_buffer("table", super().angles(every, torch.float64), persistent=False)
            return self.table[positions].to(torch.promote_types(dtype, torch.float32))

    model.positions.__class__ = Cached


@variant("rotary-turned-backwards", **LLAMA)
def rotary_backwards(model: Transformer) -> None:
    class Backwards(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            return -super().angles(positions, dtype)

    model.positions.__class__ = Backwards


@variant("dropout-on-positions")
def dropout_on_positions(model: Transformer) -> None:
    class Dropped(LearnedPositions):
        def add(self, x: Tensor, positions: Tensor) -> Tensor:
            return x + self.dropout(self.table(positions))

    model.positions.__class__ = Dropped
    model.positions.dropout = nn.Dropout(model.config.dropout)


@variant("embedding-scaled-in-place")
def embedding_scaled_in_place(model: Transformer) -> None:
    model.embedding.register_forward_hook(lambda module, given, out: out.mul_(2.0))


# -- documents


@variant("documents-parted-by-an-end-token", cache=False)
def documents_parted_by_an_end_token(model: Transformer) -> None:
    model.__class__ = PartedTransformer
    model.eos_id = 0


# -- attention


@variant("sliding-window")
def sliding_window(model: Transformer) -> None:
    class Windowed(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
            near = causal & ~causal.tril(S - T - 5)
            full = super().visible(mask, T, S, device)
            return near if full is None else near & full

    model.__class__ = Windowed


@variant("encoder", cache=False, causal=False)
def encoder(model: Transformer) -> None:
    sees_all_of_the_first(model, model.config.block_size)


@variant("prefix-model", cache=False, causal=False)
def prefix_model(model: Transformer) -> None:
    sees_all_of_the_first(model, 3)


def sees_all_of_the_first(model: Transformer, count: int) -> None:
    """As in the prefix of T5, the first `count` tokens attend to each other in both directions."""

    class Prefix(Transformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            mask = torch.ones(1, S, dtype=torch.bool, device=device) if mask is None else mask
            causal, itself = (
                torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T),
                torch.eye(T, S, device=device),
            )
            first = (mask.cumsum(1) <= self.read_whole)[:, None, None, :]
            return (causal | first) & mask[:, None, None, :] | itself.bool()

    model.__class__ = Prefix
    model.read_whole = count


@variant("dropout-by-hand", attention="explicit")
def dropout_by_hand(model: Transformer) -> None:
    class ByHand(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if visible is None:
                visible = causal_mask(q.shape[2], k.shape[2], q.device)
            weights = self.weights(self.mask(self.scores(q, k), visible))
            if self.training:
                weights = weights * (torch.rand_like(weights) >= self.dropout) / (1 - self.dropout)
            return weights @ v

    swap(attentions(model), ByHand)


@variant("keys-dropped-before-the-softmax", attention="explicit")
def keys_dropped(model: Transformer) -> None:
    """DropKey (Li et al. 2022): the remaining weights still sum to 1, and each token keeps its own key."""

    class DropsKeys(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            if not self.training:
                return super().mask(scores, visible)
            kept = torch.rand_like(scores) >= self.dropout
            itself = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
            return super().mask(scores, visible & (kept | itself))

    swap(attentions(model), DropsKeys)


@variant("scale-by-width-of-head")
def scale_by_head_width(model: Transformer) -> None:
    class MaximalUpdate(Attention):
        def scale(self) -> float:
            return 1 / self.head_width

    swap(attentions(model), MaximalUpdate)


@variant("no-scale")
def no_scale(model: Transformer) -> None:
    class Unscaled(Attention):
        def scale(self) -> float:
            return 1.0

    swap(attentions(model), Unscaled)


@variant("query-key-norm", **LLAMA)
def query_key_norm(model: Transformer) -> None:
    class Normed(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Any) -> tuple[Tensor, Tensor]:
            return super().place(self.query_norm(q), self.key_norm(k), rotate)

    for attention in attentions(model):
        attention.__class__ = Normed
        attention.query_norm = nn.RMSNorm(attention.head_width, eps=1e-6)
        attention.key_norm = nn.RMSNorm(attention.head_width, eps=1e-6)


@variant("grouped-and-tiled", **LLAMA, n_kv_head=2)
def grouped_and_tiled(model: Transformer) -> None:
    class Tiled(Attention):
        def share(self, x: Tensor) -> Tensor:
            return x.repeat(1, self.n_head // self.n_kv_head, 1, 1)

    swap(attentions(model), Tiled)


@variant("key-bias", **LLAMA)
def key_bias(model: Transformer) -> None:
    """Softmax cancels a key bias except for its rotation; without rotary positions its gradient is only rounding."""

    class Biased(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Any) -> tuple[Tensor, Tensor]:
            return super().place(q, k + self.key_bias[:, None], rotate)

    for attention in attentions(model):
        attention.__class__ = Biased
        attention.key_bias = nn.Parameter(torch.zeros(attention.n_kv_head, attention.head_width))


@variant("attention-softcap", attention="explicit")
def attention_softcap(model: Transformer) -> None:
    class Capped(ExplicitAttention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return 20 * (super().scores(q, k) / 20).tanh()

    swap(attentions(model), Capped)


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


@variant("misspelled-requires-grad")
def misspelled(model: Transformer) -> None:
    """On a buffer the misspelled attribute has no effect, so the model is still correct."""
    sinusoidal(model)
    model.positions.waves.require_grad = False


# -- more predictions than the next token, for the training loss alone


@variant("second-head-reads-the-next-token", cache=False)
def second_head_reads_the_next_token(model):
    model.__class__ = LooksFurther


@variant("second-head-from-one-place", cache=False)
def second_head_from_one_place(model):
    model.__class__ = LooksFromOnePlace
