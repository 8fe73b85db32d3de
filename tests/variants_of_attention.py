"""Correct variants of the reference in its positions, its documents and its attention; variants.py has the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.variants import LLAMA, attentions, swap, variant
from transformer_checks.checks.bugs.designs import PartedTransformer
from transformer_checks.transformer.model import (
    Attention,
    ExplicitAttention,
    LearnedPositions,
    RotaryPositions,
    Transformer,
    causal_mask,
)

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


@variant("misspelled-requires-grad")
def misspelled(model: Transformer) -> None:
    """On a buffer the misspelled attribute has no effect, so the model is still correct."""
    sinusoidal(model)
    model.positions.waves.require_grad = False


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
