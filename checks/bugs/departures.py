"""More bugs that leave a model of its own: rotary angles, what attention does to scores, where norms and sums stand.

Like those of architecture.py they break no law, and only a declared architecture tells them from a design.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...transformer.model import (
    Attention,
    Block,
    ExplicitAttention,
    GeluFeedForward,
    KeyValueCache,
    LearnedPositions,
    RotaryPositions,
    Rotation,
    SwigluFeedForward,
    Transformer,
)
from . import bug
from .architecture import GELU, GPT2, LLAMA, LOGITS, blocks, norms, redefine
from .designs import KeepingTransformer, keeping
from .generation import replace

LAST = "check_spec.check_last_position_agrees"
SUMS = "check_parts.check_attention_weights_sum_to_one"
DRAWS = "check_spec.check_generation_draws_from_the_logits"
EXPLICIT_GPT2: dict[str, Any] = dict(GPT2, attention="explicit")
EXPLICIT_LLAMA: dict[str, Any] = dict(LLAMA, attention="explicit")


# -- rotary positions


@bug("rope-base-of-its-own", "the rotary base in the code is 1000, whatever the configuration says",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_base_of_its_own(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * 1000.0 ** (-pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("rope-exponent-halved", "the rotary exponent is i / D for pair i, not 2i / D",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_exponent_halved(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(self.head_width // 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("rope-exponent-doubled", "the rotary exponent is 4i / D for pair i, not 2i / D: doubled twice",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_exponent_doubled(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-2 * pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("rope-exponent-by-model-width", "the rotary exponent is divided by the model's width, not by a head's",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_exponent_by_model_width(model: Transformer) -> None:
    width = model.config.n_embd

    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-pairs / width)

    redefine(model.positions, angles=angles)


@bug("rope-exponent-positive", "the rotary frequencies grow from pair to pair: base to the +2i / D",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_exponent_positive(model: Transformer) -> None:
    def angles(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (pairs / self.head_width)

    redefine(model.positions, angles=angles)


@bug("rope-sign-lost", "the rotary turn adds where it should subtract: a cos + b sin, b cos + a sin is no rotation",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_sign_lost(model: Transformer) -> None:
    def rotation(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = self.angles(positions, dtype).unsqueeze(-3)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def rotate(x: Tensor) -> Tensor:
            a, b = self.pairs(x)
            return self.unpair(a * cos + b * sin, b * cos + a * sin)

        return rotate

    redefine(model.positions, rotation=rotation)


@bug("rope-half-of-the-features", "only the first half of a head's features is turned, as in GPT-NeoX but not in Llama",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_half_of_the_features(model: Transformer) -> None:
    def rotation(self: RotaryPositions, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = self.angles(positions, dtype).unsqueeze(-3)
        turned = self.head_width // 4 * 2
        cos, sin = (f[..., : turned // 2].to(dtype) for f in (angles.cos(), angles.sin()))

        def rotate(x: Tensor) -> Tensor:
            a, b = self.pairs(x[..., :turned])
            return torch.cat((self.unpair(a * cos - b * sin, b * cos + a * sin), x[..., turned:]), dim=-1)

        return rotate

    redefine(model.positions, rotation=rotation)


@bug("rope-twice", "queries and keys are turned twice", caught_by=(LOGITS,), model=True, **LLAMA)
def rope_twice(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, place=lambda self, q, k, rotate: (rotate(rotate(q)), rotate(rotate(k))))


@bug("rope-missing", "queries and keys are not turned: the model has no positions",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def rope_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, place=lambda self, q, k, rotate: (q, k))


@bug("rope-on-v", "the values are turned like queries and keys", caught_by=(LOGITS,), model=True, **LLAMA)
def rope_on_values(model: Transformer) -> None:
    def forward(self: Attention, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None):
        self.turn = rotate  # type: ignore[assignment]
        return Attention.forward(self, x, rotate, visible, cache)

    def split_heads(self: Attention, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = Attention.split_heads(self, qkv)
        return q, k, self.turn(v)  # type: ignore[operator]

    for block in blocks(model):
        redefine(block.attention, forward=forward, split_heads=split_heads)


# -- learned positions


@bug("position-in-every-block", "the position vectors are added again before every block but the first",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def position_in_every_block(model: Transformer) -> None:
    table = model.positions

    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        return Block.forward(self, table.add(x, torch.arange(x.shape[1], device=x.device)), *others)

    for block in blocks(model)[1:]:
        redefine(block, forward=forward)


@bug("position-offset-by-one", "position t reads row t + 1 of the table, and the last one row 0",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def position_offset_by_one(model: Transformer) -> None:
    def add(self: LearnedPositions, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table((positions + 1) % self.table.num_embeddings)

    redefine(model.positions, add=add)


@bug("position-not-added", "the position vectors are looked up and not added: the model has no positions",
     source="https://github.com/guocheng2025/Transformer-Encoder/issues/1", caught_by=(LOGITS,), model=True,
     **GPT2)  # fmt: skip
def position_not_added(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x)


@bug("position-scaled", "the position vectors are multiplied by √C before they are added",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def position_scaled(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x + self.table(positions) * x.shape[-1] ** 0.5)


@bug("position-divided", "the position vectors are divided by √C before they are added, as in x-transformers",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def position_divided(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x + self.table(positions) * x.shape[-1] ** -0.5)


# -- attention


@bug("scale-by-sequence", "attention scores are divided by the square root of the number of tokens, not of D",
     caught_by=(LOGITS,), model=True, **EXPLICIT_GPT2)  # fmt: skip
def scale_by_sequence(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scores=lambda self, q, k: q @ k.transpose(-2, -1) * k.shape[-2] ** -0.5)


@bug("scale-by-heads", "attention scores are divided by the square root of the number of heads, not of D",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def scale_by_heads(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.n_head**-0.5)


@bug("scale-by-layer", "attention scores are divided by the number of the layer too, as a switch of GPT-2's kin has it",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def scale_by_layer(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.head_width**-0.5 / (self.layer + 1))


@bug("scale-after-softmax", "the attention weights are divided by √D after the softmax, not the scores before it",
     caught_by=(SUMS, LOGITS), model=True, **EXPLICIT_GPT2)  # fmt: skip
def scale_after_softmax(model: Transformer) -> None:
    for block in blocks(model):
        redefine(
            block.attention,
            scores=lambda self, q, k: q @ k.transpose(-2, -1),
            weights=lambda self, scores: scores.softmax(dim=-1) * self.scale(),
        )


@bug("softmax-plus-one", "attention weights are exp(s) / (1 + Σ exp(s)): they do not sum to one",
     caught_by=(LOGITS,), model=True, **EXPLICIT_GPT2)  # fmt: skip
def softmax_plus_one(model: Transformer) -> None:
    def weights(self: ExplicitAttention, scores: Tensor) -> Tensor:
        return F.pad(scores, (0, 1)).softmax(dim=-1)[..., :-1]

    for block in blocks(model):
        redefine(block.attention, weights=weights)


@bug("sigmoid-for-softmax", "attention weights are sigmoids of the scores: they do not sum to one",
     caught_by=(LOGITS,), model=True, **EXPLICIT_GPT2)  # fmt: skip
def sigmoid_for_softmax(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, weights=lambda self, scores: scores.sigmoid())


@bug("attention-softcap-undeclared", "attention scores are capped, 5 tanh(s / 5): neither GPT-2 nor Llama does",
     caught_by=(LOGITS,), model=True, **EXPLICIT_GPT2)  # fmt: skip
def attention_softcap_undeclared(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scores=lambda self, q, k: 5 * (ExplicitAttention.scores(self, q, k) / 5).tanh())


@bug("query-key-norm-undeclared", "queries and keys are normed to length √D, which neither GPT-2 nor Llama does",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def query_key_norm_undeclared(model: Transformer) -> None:
    def place(self: Attention, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(F.rms_norm(q, q.shape[-1:])), rotate(F.rms_norm(k, k.shape[-1:]))

    for block in blocks(model):
        redefine(block.attention, place=place)


@bug("values-are-keys", "attention averages the keys: the values' projection is not used",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def values_are_keys(model: Transformer) -> None:
    def split_heads(self: Attention, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, _ = Attention.split_heads(self, qkv)
        return q, k, k

    for block in blocks(model):
        redefine(block.attention, split_heads=split_heads)


# -- norms


@bug("rms-divided-by-the-inverse-root", "RMSNorm divides by rsqrt(…), the inverse root: large inputs become larger",
     source="https://github.com/mosaicml/llm-foundry/issues/371", caught_by=(LOGITS,), model=True,
     **LLAMA)  # fmt: skip
def rms_divided_by_the_inverse_root(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight)


# -- where norms and sums stand


@bug("norm-of-the-update", "each norm is applied to what attention and feed-forward give: x + norm(f(x))",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def norm_of_the_update(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.attention_norm(self.attention(x, *others)))
        return self.residual(x, self.feed_forward_norm(self.feed_forward(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("feed-forward-first", "the feed-forward comes before attention in every block",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def feed_forward_first(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.feed_forward(self.feed_forward_norm(x)))
        return self.residual(x, self.attention(self.attention_norm(x), *others))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("feed-forward-reads-the-first-norm", "the feed-forward reads the input of attention and not the sum after it",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def feed_forward_reads_the_first_norm(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        normed = self.attention_norm(x)
        return self.residual(self.residual(x, self.attention(normed, *others)), self.feed_forward(normed))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("residual-from-the-blocks-input", "the feed-forward is added to the block's input: attention is only read",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def residual_from_the_blocks_input(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        attended = self.residual(x, self.attention(self.attention_norm(x), *others))
        return self.residual(x, self.feed_forward(self.feed_forward_norm(attended)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("residual-halved", "the sum of stream and update is halved", caught_by=(LOGITS,), model=True, **GPT2)
def residual_halved(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: (x + self.dropout(update)) / 2)


@bug("update-scaled-by-depth", "updates are divided by √(2 L) in the forward: a rule of initialization misread",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def update_scaled_by_depth(model: Transformer) -> None:
    factor = (2 * model.config.n_layer) ** -0.5
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x + factor * self.dropout(update))


@bug("embedding-normed", "the embedding goes through a norm without gain before the first block",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def embedding_normed(model: Transformer) -> None:
    def add(self: LearnedPositions, x: Tensor, positions: Tensor) -> Tensor:
        return F.layer_norm(LearnedPositions.add(self, x, positions), x.shape[-1:])

    redefine(model.positions, add=add)


# -- the feed-forward


@bug("activation-after-both", "the activation comes after the first and after the second linear layer",
     caught_by=(LOGITS,), model=True, **GELU)  # fmt: skip
def activation_after_both(model: Transformer) -> None:
    for block in blocks(model):
        redefine(
            block.feed_forward, forward=lambda self, x: self.activation(self.output(self.activation(self.input(x))))
        )


@bug("relu-squared-for-gelu", "the feed-forward's activation is ReLU squared, not GELU",
     caught_by=(LOGITS,), model=True, **GELU)  # fmt: skip
def relu_squared_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x).square())


@bug("tanh-for-gelu", "the feed-forward's activation is tanh, not GELU", caught_by=(LOGITS,), model=True, **GELU)
def tanh_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x.tanh())


@bug("relu-for-silu", "the gate's activation is ReLU, not SiLU: ReGLU for SwiGLU",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def relu_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x))


@bug("gelu-tanh-for-silu", "the gate's activation is the tanh form of GELU, not SiLU",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def tanh_gelu_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.gelu(x, approximate="tanh"))


@bug("gate-without-activation", "gate and value are multiplied without an activation: bilinear, not SwiGLU",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def gate_without_activation(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x)


@bug("activation-of-the-product", "the activation is taken of gate times value, not of the gate",
     caught_by=(LOGITS,), model=True, **LLAMA)  # fmt: skip
def activation_of_the_product(model: Transformer) -> None:
    def forward(self: SwigluFeedForward, x: Tensor) -> Tensor:
        return self.output(self.activation(self.gate(x) * self.input(x)))

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


@bug("activation-of-both", "the activation is taken of gate and value both", caught_by=(LOGITS,), model=True, **LLAMA)
def activation_of_both(model: Transformer) -> None:
    def forward(self: SwigluFeedForward, x: Tensor) -> Tensor:
        return self.output(self.activation(self.gate(x)) * self.activation(self.input(x)))

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


@bug("bias-not-added", "the biases of the feed-forward are held and not added",
     caught_by=(LOGITS,), model=True, **GPT2)  # fmt: skip
def bias_not_added(model: Transformer) -> None:
    def forward(self: GeluFeedForward, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.input.weight)), self.output.weight)

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


# -- what decoding asks for


@bug("last-position-is-the-first", "asked for the last position's logits alone, the model gives the first's",
     caught_by=(LAST,), model=True, of=keeping, **GPT2)  # fmt: skip
def last_position_is_the_first(model: KeepingTransformer) -> None:
    redefine(model, keep=lambda self, logits, n: logits[:, :n] if n else logits)


@bug("last-position-of-the-last-row", "asked for the last position's logits alone, every row gets the last row's",
     caught_by=(LAST,), model=True, of=keeping, **GPT2)  # fmt: skip
def last_position_of_the_last_row(model: KeepingTransformer) -> None:
    redefine(model, keep=lambda self, logits, n: logits[-1:, -n:].expand(len(logits), -1, -1) if n else logits)


@bug("generation-of-the-last-row", "every row's next token is drawn from the logits of the last row",
     caught_by=(DRAWS,), **GPT2)  # fmt: skip
def generation_of_the_last_row(parts: SimpleNamespace) -> None:
    replace(parts, last_position=lambda logits: logits[-1:, -1].expand(len(logits), -1))
