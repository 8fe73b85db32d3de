"""Mistakes at the key-value cache: in what it stores, and in what the model makes of the tokens that it holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, KeyValueCache, RotaryPositions, Transformer
from . import bug

DECODING = "check_cache.check_cached_decoding_equals_full"
PIECES = "check_cache.check_cached_pieces_equal_full"
PADDING = "check_cache.check_cached_padding_equals_full"
CALLS = "check_cache.check_caches_are_isolated"
ROWS = "check_cache.check_cached_rows_are_isolated"
INTO = "check_causality.check_future_cannot_change_past_into_a_cache"
OVERFLOW = "check_cache.check_cache_overflow_is_refused_or_slides"


def with_cache(model: nn.Module, kind: type[KeyValueCache]) -> None:
    """Makes the model's caches of another class."""

    class Cached(Transformer):
        def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
            cache = super().new_cache(batch_size, capacity)
            cache.__class__ = kind
            return cache

    model.__class__ = Cached


# -- what is stored


@bug(
    "cache-not-appended",
    "only the newest keys and values are kept: decoding forgets the prompt",
    caught_by=(DECODING,),
    model=True,
)
def newest_only(model: Transformer) -> None:
    class Forgetful(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            held = super().append(layer, k, v)
            return (k, v) if k.shape[2] == 1 else held

    with_cache(model, Forgetful)


@bug(
    "cache-leaks-between-calls",
    "the cache stays on the model and is emptied only when it is full",
    caught_by=(CALLS,),
    source="https://github.com/tracel-ai/burn-lm/pull/53 ; https://github.com/rajveer43/VeloxQuant-MLX/issues/53",
    model=True,
)
def cache_kept_on_the_model(model: Transformer) -> None:
    class Keeps(Transformer):
        def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
            kept = self.__dict__.setdefault("kept", {})
            if batch_size not in kept or 2 * kept[batch_size].length >= capacity:
                kept[batch_size] = super().new_cache(batch_size, self.config.block_size)
            return kept[batch_size]

    model.__class__ = Keeps


@bug("cache-rows-mixed", "keys are stored under the row of their neighbour", caught_by=(ROWS, DECODING), model=True)
def rows_mixed(model: Transformer) -> None:
    class Mixed(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return super().append(layer, k.roll(1, dims=0), v)

    with_cache(model, Mixed)


@bug(
    "cache-swaps-layers",
    "every layer reads and writes the keys and values of layer 0",
    caught_by=(DECODING,),
    model=True,
)
def one_layer_for_all(model: Transformer) -> None:
    class OneLayer(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return super().append(0, k, v)

    with_cache(model, OneLayer)


@bug("cache-forgets-padding", "tokens read in earlier calls all count as real", caught_by=(PADDING,), model=True)
def padding_forgotten(model: Transformer) -> None:
    class Forgetful(KeyValueCache):
        def extend(self, mask: Tensor | None, T: int) -> Tensor | None:
            if self.mask is not None:
                self.mask[:, : self.length] = True
            return super().extend(mask, T)

    with_cache(model, Forgetful)


@bug(
    "cache-overflow",
    "a full cache starts again at its first place without a word",
    caught_by=(OVERFLOW,),
    source="https://github.com/karpathy/llama2.c/pull/348 ; https://github.com/karpathy/nanochat/pull/627",
    model=True,
)
def wraps_silently(model: Transformer) -> None:
    class Wraps(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            if cache is not None and cache.length + tokens.shape[1] > cache.capacity:
                cache.length = 0
            super().refuse_bad_input(tokens, mask, cache)

    model.__class__ = Wraps


# -- what the model makes of it


def with_attention(model: Transformer, kind: type[Attention]) -> None:
    for block in model.blocks:
        block.attention.__class__ = kind


@bug(
    "sdpa-topleft-alignment",
    "the causal mask is aligned at the top left: what is read now sees the oldest keys, not the newest",
    caught_by=(DECODING,),
    source="https://github.com/pytorch/pytorch/issues/144858 ; https://github.com/pytorch/pytorch/issues/108108",
    model=True,
)
def aligned_at_the_top_left(model: Transformer) -> None:
    class TopLeft(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale())

    with_attention(model, TopLeft)


@bug(
    "sdpa-topleft-chunk-only",
    "several tokens read over a cache are masked as if it were empty; single ones are right",
    caught_by=(PIECES,),
    source="https://github.com/huggingface/candle/pull/3743 ; https://github.com/hyprstream/hyprstream/pull/1521",
    model=True,
)
def pieces_aligned_at_the_top_left(model: Transformer) -> None:
    class TopLeft(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if 1 < q.shape[2] < k.shape[2]:
                visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            return super().attend(q, k, v, visible)

    with_attention(model, TopLeft)


@bug(
    "prefill-unmasked-when-cache-given",
    "the causal mask is left out when there is a cache: a prompt read at once sees its own future",
    caught_by=(DECODING, INTO),
    source="https://github.com/Mikyx-1/TinyLLM/issues/17",
    model=True,
)
def unmasked_with_a_cache(model: Transformer) -> None:
    class Unmasked(Attention):
        def forward(self, x: Tensor, rotate, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if cache is not None:
                visible = torch.ones(x.shape[1], cache.length, dtype=torch.bool, device=x.device)
            return super().forward(x, rotate, visible, cache)

    with_attention(model, Unmasked)


@bug(
    "decode-position-always-zero",
    "a single token read over a cache is put at position 0",
    caught_by=(DECODING,),
    source="https://github.com/Blaizzy/mlx-vlm/issues/1983 ; https://github.com/RobertCsordas/moeut/pull/6",
    model=True,
)
def decoded_at_position_0(model: Transformer) -> None:
    class AtZero(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return torch.zeros_like(positions) if T == 1 else positions

    model.__class__ = AtZero


@bug(
    "chunked-prefill-positions",
    "positions start at 0 again in every piece of several tokens",
    caught_by=(PIECES,),
    source="https://github.com/huggingface/transformers/issues/43082",
    model=True,
)
def positions_start_again(model: Transformer) -> None:
    class StartAgain(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return positions - positions[..., :1] if 1 < T < S else positions

    model.__class__ = StartAgain


@bug(
    "prefill-all-same-position",
    "all tokens of a prompt read over a cache get the position of the last",
    caught_by=(DECODING,),
    source="https://github.com/NVIDIA/TensorRT-LLM/issues/2084",
    model=True,
)
def one_position_for_a_prompt(model: Transformer) -> None:
    class OnePosition(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            self.__dict__["cached"] = cache is not None
            return super().forward(tokens, mask, cache)

        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return positions[..., -1:].expand_as(positions) if self.cached else positions

    model.__class__ = OnePosition


@bug(
    "rope-single-position-kernel",
    "a single token is rotated in its first head only",
    caught_by=(DECODING,),
    source="https://github.com/oxiglade/mlx-rs/pull/357 ; https://github.com/elixir-nx/emlx/issues/121",
    model=True,
    positions="rotary",
)
def first_head_rotated(model: Transformer) -> None:
    class FirstHead(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype):
            rotate = super().rotation(positions, dtype)

            def first(x: Tensor) -> Tensor:
                return torch.cat((rotate(x[:, :1]), x[:, 1:]), dim=1) if x.shape[2] == 1 else rotate(x)

            return first

    model.positions.__class__ = FirstHead
