"""A causal transformer language model: the GPT-2 and Llama families, read top to bottom.

Config, parts, attention, block, model. Each idea (mask, scale, positions, norm, residual) is one small method.
Not here: the loss (loss.py), decoding (generation.py), training (trainer.py).

Shapes: B rows, T tokens read now, S tokens visible (cached ones included), C width, H heads, G key-value heads,
D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and parts of a model. `gpt2()` and `llama()` fill in the parts of each family."""

    vocab_size: int = 15  # V, number of token ids
    block_size: int = 23  # longest sequence the model reads, in tokens
    n_layer: int = 1  # blocks
    n_head: int = 4  # H, query heads
    n_embd: int = 128  # C, width of the residual stream
    n_kv_head: int | None = None  # G, key-value heads; None: as many as query heads
    n_hidden: int | None = None  # width of the feed-forward; None: 4 C for gelu, 8/3 C rounded up to 8 for swiglu
    dropout: float = 0.0  # probability, at the embedding, the attention weights and both sublayer outputs
    positions: Literal["learned", "rotary", "rotary-interleaved"] = "learned"  # how a token knows its place
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm or RMSNorm, before each part of a block and before the head
    feed_forward: Literal["gelu", "swiglu"] = "gelu"  # two layers with GELU between, or a gated value
    attention: Literal["fused", "explicit"] = "fused"  # the same numbers, by one kernel or step by step
    bias: bool = True  # biases in projections and norms
    tied: bool = True  # the head shares the token embedding
    norm_eps: float = 1e-5  # added to the variance (or mean square) inside the root
    rope_base: float = 10_000.0  # the slowest rotary wavelength is about 2π times this, in tokens

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "n_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.positions != "learned" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, got n_embd / n_head = {self.head_width}")
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must be at least 0, got {self.norm_eps}")
        if not self.rope_base > 0:
            raise ValueError(f"rope_base must be above 0, got {self.rope_base}")
        for name, parts in PARTS.items():
            if getattr(self, name) not in parts:
                raise ValueError(f"{name} must be one of {', '.join(parts)}, got {getattr(self, name)!r}")

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden(self) -> int:
        if self.n_hidden is not None:
            return self.n_hidden
        return 4 * self.n_embd if self.feed_forward == "gelu" else -(-8 * self.n_embd // 24) * 8


def gpt2(**sizes: Any) -> ModelConfig:
    """The GPT-2 family: learned positions, LayerNorm before each part, tanh GELU, biases, tied head."""
    return ModelConfig(**sizes)


def llama(**sizes: Any) -> ModelConfig:
    """The Llama family: rotary positions, RMSNorm, SwiGLU, no biases, a head of its own."""
    family = dict(positions="rotary", norm="rms", feed_forward="swiglu", bias=False, tied=False, norm_eps=1e-6)
    return ModelConfig(**{**family, **sizes})


class KeyValueCache:
    """Keys and values of the tokens read so far, with room for `capacity` of them.

    `length` counts the tokens read; `mask` [B, capacity] tells the real ones from padding, None while none was padded.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.n_layer, batch_size, config.kv_heads, capacity, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.mask: Tensor | None = None
        self.capacity = capacity
        self.length = 0

    def extend(self, mask: Tensor | None, T: int) -> Tensor | None:
        """Makes room for T more tokens; the mask of all tokens so far [B, S], or None if all are real."""
        if mask is not None and self.mask is None:
            self.mask = torch.ones(self.keys.shape[1], self.capacity, dtype=torch.bool, device=self.keys.device)
        if mask is not None and self.mask is not None:
            self.mask[:, self.length : self.length + T] = mask
        self.length += T
        return None if self.mask is None else self.mask[:, : self.length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's newest keys and values [B, G, T, D]; all of them so far [B, G, S, D]."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer, :, :, new] = k
        self.values[layer, :, :, new] = v
        return self.keys[layer, :, :, : self.length], self.values[layer, :, :, : self.length]


Rotation = Callable[[Tensor], Tensor]  # turns queries or keys [B, H, T, D] by their positions


class LearnedPositions(nn.Module):
    """One learned vector a position, added to the token's (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = self.table(positions)
        return x + found

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        return lambda x: x


class RotaryPositions(nn.Module):
    """Queries and keys turned by an angle that grows with the position (Su et al. 2021, eq. 15).

    Feature i turns together with feature i + D/2, as in the transformers library.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width, self.base = config.head_width, config.rope_base

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., T, D/2], in float32 at least: bfloat16 cannot tell position 257 from 258."""
        dtype = torch.promote_types(dtype, torch.float32)
        pairs = torch.arange(0, self.head_width, 2, device=positions.device, dtype=dtype)
        return positions[..., None].to(dtype) * self.base ** (-pairs / self.head_width)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = self.angles(positions, dtype).unsqueeze(-3)  # one angle for all heads
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

        def rotate(x: Tensor) -> Tensor:
            a, b = self.pairs(x)
            return self.unpair(a * cos - b * sin, b * cos + a * sin)

        return rotate

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, dim=-1)
        return a, b

    def unpair(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), dim=-1)


class InterleavedRotaryPositions(RotaryPositions):
    """The paper's own layout: feature 2i turns together with feature 2i + 1."""

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., 0::2], x[..., 1::2]

    def unpair(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((a, b), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention over H query heads and G key-value heads, by PyTorch's fused kernel."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_width = config.n_head, config.kv_heads, config.head_width
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_width, bias=config.bias)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        q, k, v = self.split_heads(self.qkv(x))  # [B, H, T, D], [B, G, T, D] twice
        q, k = self.place(q, k, rotate)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # [B, G, S, D]
        k, v = self.share(k), self.share(v)  # [B, H, S, D]
        out: Tensor = self.output(self.merge_heads(self.attend(q, k, v, visible)))
        return out

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, self.n_head + 2 * self.n_kv_head, self.head_width)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)  # type: ignore[no-untyped-call]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(q), rotate(k)

    def share(self, x: Tensor) -> Tensor:
        """Query heads h·H/G … (h+1)·H/G - 1 read key-value head h."""
        return x if self.n_kv_head == self.n_head else x.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

    def scale(self) -> float:
        return float(self.head_width**-0.5)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """`visible` is None when the plain causal mask is all there is: the kernel then has a fast path of its own."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1,
            dropout_p=self.dropout if self.training else 0.0, scale=self.scale(),
        )  # fmt: skip

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # [B, T, C]


class ExplicitAttention(Attention):
    """The same attention step by step: scores, mask, softmax, dropout, weighted sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        if visible is None:
            visible = causal_mask(q.shape[2], k.shape[2], q.device)
        weights = self.weights(self.mask(self.scores(q, k), visible))
        return F.dropout(weights, self.dropout, self.training) @ v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * self.scale()  # [B, H, T, S]

    def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible, -torch.inf)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-1)


class GeluFeedForward(nn.Module):
    """Two layers with the tanh form of GELU between (Hendrycks and Gimpel 2016), as GPT-2 has it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.input(x)))
        return out

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class SwigluFeedForward(nn.Module):
    """A gate and a value, multiplied (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.input = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.gate(x)) * self.input(x))
        return out

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)


def layer_norm(config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rms_norm(config: ModelConfig) -> nn.Module:
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


PARTS: dict[str, dict[str, Callable[..., Any]]] = {
    "positions": {
        "learned": LearnedPositions,
        "rotary": RotaryPositions,
        "rotary-interleaved": InterleavedRotaryPositions,
    },
    "norm": {"layer": layer_norm, "rms": rms_norm},
    "feed_forward": {"gelu": GeluFeedForward, "swiglu": SwigluFeedForward},
    "attention": {"fused": Attention, "explicit": ExplicitAttention},
}


class Block(nn.Module):
    """Attention, then feed-forward, each on a normed copy and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = PARTS["norm"][config.norm](config)
        self.attention = PARTS["attention"][config.attention](config, layer)
        self.feed_forward_norm = PARTS["norm"][config.norm](config)
        self.feed_forward = PARTS["feed_forward"][config.feed_forward](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        x = self.residual(x, self.attention(self.attention_norm(x), rotate, visible, cache))
        return self.residual(x, self.feed_forward(self.feed_forward_norm(x)))

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        kept: Tensor = self.dropout(update)
        return x + kept


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """[T, S], True where a query may look: the last query sees all S keys, each earlier one a key less."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class Transformer(nn.Module):
    """Token ids [B, T] to logits [B, T, V].

    `mask` [B, T], True for real tokens, marks padding on either side; `cache` holds earlier tokens of the same rows.
    Raises ValueError for a sequence longer than the block size and for a token id outside the vocabulary.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = PARTS["positions"][config.positions](config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = PARTS["norm"][config.norm](config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.initialize()

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        self.refuse_bad_input(tokens, mask, cache)
        x = self.embed(tokens)  # [B, T, C]
        mask = None if mask is None else mask.bool()
        if cache is not None:
            mask = cache.extend(mask, tokens.shape[1])  # now of all S tokens
        T, S = tokens.shape[1], tokens.shape[1] if cache is None else cache.length
        positions = self.token_positions(mask, T, S, tokens.device)
        x = self.dropout(self.positions.add(x, positions))
        rotate = self.positions.rotation(positions, x.dtype)
        visible = self.visible(mask, T, S, tokens.device)
        for block in self.blocks:
            x = block(x, rotate, visible, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty cache for this model's layers, where its weights are."""
        weight = self.embedding.weight
        return KeyValueCache(self.config, batch_size, capacity, device=weight.device, dtype=weight.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        try:
            vectors: Tensor = self.embedding(tokens)
        except IndexError:
            low, high = int(tokens.min()), int(tokens.max())
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary: 0 to {self.config.vocab_size - 1}") from None
        return vectors

    def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
        """[T], or [B, T] counted from the mask: the first real token has position 0 wherever it stands."""
        if mask is None:
            return torch.arange(S - T, S, device=device)
        return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, S - T :]

    def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
        """[B, 1, T, S] or [T, S], True where a query may look; None for what `Attention.attend` knows by itself.

        Every token sees itself, padding too: a softmax over nothing is NaN, and NaN times a zero weight is still NaN.
        """
        if mask is None:
            return None if T in (1, S) else causal_mask(T, S, device)
        causal = causal_mask(T, S, device)
        itself = causal ^ causal.tril(S - T - 1)
        return (causal & mask[:, None, None, :]) | itself

    def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [B, T], got the shape {list(tokens.shape)}")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask must have the tokens' shape {list(tokens.shape)}, got {list(mask.shape)}")
        (B, T), seen = tokens.shape, 0 if cache is None else cache.length
        if seen + T > self.config.block_size:
            raise ValueError(f"{seen + T} tokens do not fit the block size of {self.config.block_size}")
        if cache is not None and (B != cache.keys.shape[1] or seen + T > cache.capacity):
            room = f"{cache.keys.shape[1]} rows of {cache.capacity} tokens, {seen} of them read"
            raise ValueError(f"the cache has {room}: tokens of shape {list(tokens.shape)} do not fit")

    def initialize(self) -> None:
        """Normal with deviation 0.02, zero biases; what writes to the residual stream is scaled down by √(2 layers)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in cast(Iterable[Block], self.blocks):
            for projection in (block.attention.output, block.feed_forward.output):
                nn.init.normal_(projection.weight, std=0.02 / (2 * self.config.n_layer) ** 0.5)
