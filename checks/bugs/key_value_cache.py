"""Wrong key-value caches: what is stored, and the mask and positions of tokens read over a cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, KeyValueCache, RotaryPositions, Rotation, Transformer
from ..check_cache import (
    check_cache_overflow_is_refused_or_slides,
    check_cached_decoding_equals_full,
    check_cached_padding_equals_full,
    check_cached_pieces_equal_full,
    check_cached_rows_are_isolated,
    check_caches_are_isolated,
)
from ..check_causality import check_future_cannot_change_past_into_a_cache
from . import bug
from .damage import attend_with


def with_cache(model: nn.Module, kind: type[KeyValueCache]) -> None:
    """Makes the model's caches of another class."""

    class Cached(Transformer):
        def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
            cache = super().new_cache(batch_size, capacity)
            cache.__class__ = kind
            return cache

    model.__class__ = Cached


# -- what is stored


@bug("only the newest keys and values are kept: decoding forgets the prompt", check_cached_decoding_equals_full)
def cache_not_appended(model: Transformer) -> None:
    class Forgetful(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            held = super().append(layer, k, v)
            return (k, v) if k.shape[2] == 1 else held

    with_cache(model, Forgetful)


@bug(
    "the cache is kept on the model and emptied only when full: calls see each other's tokens",
    check_caches_are_isolated,
    source="https://github.com/tracel-ai/burn-lm/pull/53 ; https://github.com/rajveer43/VeloxQuant-MLX/issues/53",
)
def cache_leaks_between_calls(model: Transformer) -> None:
    class Keeps(Transformer):
        def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
            kept: dict[int, KeyValueCache] = self.__dict__.setdefault("kept", {})
            if batch_size not in kept or 2 * kept[batch_size].length >= capacity:
                kept[batch_size] = super().new_cache(batch_size, self.config.block_size)
            return kept[batch_size]

    model.__class__ = Keeps


@bug("each row's keys are cached under the next row", check_cached_rows_are_isolated, check_cached_decoding_equals_full)
def cache_rows_mixed(model: Transformer) -> None:
    class Mixed(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return super().append(layer, k.roll(1, dims=0), v)

    with_cache(model, Mixed)


@bug("all layers share the cache of layer 0", check_cached_decoding_equals_full)
def cache_swaps_layers(model: Transformer) -> None:
    class OneLayer(KeyValueCache):
        def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return super().append(0, k, v)

    with_cache(model, OneLayer)


@bug("the cache forgets the padding mask: cached padding counts as real tokens", check_cached_padding_equals_full)
def cache_forgets_padding(model: Transformer) -> None:
    class Forgetful(KeyValueCache):
        def extend(self, mask: Tensor | None, T: int) -> Tensor | None:
            if self.mask is not None:
                self.mask[:, : self.length] = True
            return super().extend(mask, T)

    with_cache(model, Forgetful)


@bug(
    "a full cache silently starts over at its first position",
    check_cache_overflow_is_refused_or_slides,
    source="https://github.com/karpathy/llama2.c/pull/348 ; https://github.com/karpathy/nanochat/pull/627",
)
def cache_overflow(model: Transformer) -> None:
    class Wraps(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            if cache is not None and cache.length + tokens.shape[1] > cache.capacity:
                cache.length = 0
            super().refuse_bad_input(tokens, mask, cache)

    model.__class__ = Wraps


# -- the causal mask over a cache


@bug(
    "the causal mask is aligned at the top left: new tokens attend to the oldest keys, not the newest",
    check_cached_decoding_equals_full,
    source="https://github.com/pytorch/pytorch/issues/144858 ; https://github.com/pytorch/pytorch/issues/108108",
)
def sdpa_topleft_alignment(model: Transformer) -> None:
    class TopLeft(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale())

    attend_with(model, TopLeft)


@bug(
    "several tokens at once are masked as if the cache were empty; single tokens are right",
    check_cached_pieces_equal_full,
    source="https://github.com/huggingface/candle/pull/3743 ; https://github.com/hyprstream/hyprstream/pull/1521",
)
def sdpa_topleft_chunk_only(model: Transformer) -> None:
    class TopLeft(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if 1 < q.shape[2] < k.shape[2]:
                visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            return super().attend(q, k, v, visible)

    attend_with(model, TopLeft)


@bug(
    "no causal mask when a cache is given: the prompt attends to its future",
    check_cached_decoding_equals_full,
    check_future_cannot_change_past_into_a_cache,
    source="https://github.com/Mikyx-1/TinyLLM/issues/17",
)
def prefill_unmasked_when_cache_given(model: Transformer) -> None:
    class Unmasked(Attention):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if cache is not None:
                visible = torch.ones(x.shape[1], cache.length, dtype=torch.bool, device=x.device)
            return super().forward(x, rotate, visible, cache)

    attend_with(model, Unmasked)


@bug("the causal mask is off by one when a cache is given", check_future_cannot_change_past_into_a_cache)
def first_read_into_a_cache_sees_one_more(model: Transformer) -> None:
    class OneMore(Transformer):
        cached = False

        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            self.cached = cache is not None
            return super().forward(tokens, mask, cache)

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            if mask is None and self.cached:
                return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T + 1)
            return super().visible(mask, T, S, device)

    model.__class__ = OneMore


# -- positions over a cache


@bug(
    "a single token read over a cache always gets position 0",
    check_cached_decoding_equals_full,
    source="https://github.com/Blaizzy/mlx-vlm/issues/1983 ; https://github.com/RobertCsordas/moeut/pull/6",
)
def decode_position_always_zero(model: Transformer) -> None:
    class AtZero(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return torch.zeros_like(positions) if T == 1 else positions

    model.__class__ = AtZero


@bug(
    "positions restart at 0 in every chunk of a prompt",
    check_cached_pieces_equal_full,
    source="https://github.com/huggingface/transformers/issues/43082",
)
def chunked_prefill_positions(model: Transformer) -> None:
    class StartAgain(Transformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return positions - positions[..., :1] if 1 < T < S else positions

    model.__class__ = StartAgain


@bug(
    "all tokens of a prompt read over a cache get the position of the last",
    check_cached_decoding_equals_full,
    source="https://github.com/NVIDIA/TensorRT-LLM/issues/2084",
)
def prefill_all_same_position(model: Transformer) -> None:
    class OnePosition(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            self.__dict__["cached"] = cache is not None
            return super().forward(tokens, mask, cache)

        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            return positions[..., -1:].expand_as(positions) if self.cached else positions

    model.__class__ = OnePosition


@bug(
    "a single token is rotated in its first head only",
    check_cached_decoding_equals_full,
    source="https://github.com/oxiglade/mlx-rs/pull/357 ; https://github.com/elixir-nx/emlx/issues/121",
    positions="rotary",
)
def rope_single_position_kernel(model: Transformer) -> None:
    class FirstHead(RotaryPositions):
        def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
            rotate = super().rotation(positions, dtype)

            def first(x: Tensor) -> Tensor:
                return torch.cat((rotate(x[:, :1]), x[:, 1:]), dim=1) if x.shape[2] == 1 else rotate(x)

            return first

    model.positions.__class__ = FirstHead
