"""Wrong windows of sliding-window attention: off by one, ignored, undeclared, or open to the future."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...transformer.model import ExplicitAttention, Transformer, causal_mask
from ..check_cache import check_cached_decoding_equals_full
from ..check_causality import (
    check_future_cannot_change_past,
    check_one_block_sees_its_window,
    check_past_reaches_every_later_position,
    check_prefix_gives_the_same_logits,
)
from . import bug
from .damage import attend_with
from .designs import WindowAttention, sliding_window


def look_through(model: Transformer, near: Callable[[int, int, int, torch.device], Tensor]) -> None:
    """Gives every layer a window of another shape: near(window, T, S, device) is [T, S]."""

    class Other(WindowAttention):
        def near(self, T: int, S: int, device: torch.device) -> Tensor:
            return near(self.window, T, S, device)

    attend_with(model, Other)


@bug(
    "the window is off by one: of w tokens, itself included, a token attends to w - 1",
    check_one_block_sees_its_window,
    source="https://github.com/huggingface/transformers/issues/39408 ; https://github.com/ml-explore/mlx-lm/pull/390",
    of=sliding_window,
)
def window_off_by_one(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: ~causal_mask(T, S, device).tril(S - T - window + 1))


@bug("the last layer's window is one token too long", check_one_block_sees_its_window, of=sliding_window)
def window_off_by_one_in_one_layer(model: Transformer) -> None:
    class OneMore(WindowAttention):
        def near(self, T: int, S: int, device: torch.device) -> Tensor:
            return ~causal_mask(T, S, device).tril(S - T - self.window - 1)

    attend_with(model, OneMore, slice(-1, None))


@bug("the window is twice as long as configured", check_one_block_sees_its_window, of=sliding_window)
def window_doubled(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: ~causal_mask(T, S, device).tril(S - T - 2 * window))


@bug(
    "the configured window is ignored: tokens attend to the whole past",
    check_one_block_sees_its_window,
    source="https://github.com/unslothai/unsloth/pull/8253",
    of=sliding_window,
)
def window_ignored(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: torch.ones(T, S, dtype=torch.bool, device=device))


@bug(
    "the window has the wrong sign: with the causal mask, each token attends only to itself",
    check_past_reaches_every_later_position,
    check_one_block_sees_its_window,
    source="https://github.com/huggingface/transformers/pull/41228",
    of=sliding_window,
)
def window_sign_error(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T))


@bug("an undeclared window applies beyond 64 tokens", check_prefix_gives_the_same_logits, attention="explicit")
def window_only_when_long(model: Transformer) -> None:
    class Switches(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            near = visible.new_ones(scores.shape[-2:]).triu(-31)
            return super().mask(scores, visible & near if scores.shape[-1] > 64 else visible)

    attend_with(model, Switches)


class LooksAhead(WindowAttention):
    """The window is the only mask, and it reaches to both sides."""

    def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
        T, S = scores.shape[-2:]
        near = scores.new_ones(T, S).tril(S - T + self.window - 1).triu(S - T - self.window + 1)
        return scores.masked_fill(near == 0, -torch.inf)


@bug(
    "no causal mask in the sliding-window layers: the window covers the future too",
    check_future_cannot_change_past,
    source="https://github.com/huggingface/transformers/issues/31673",
    of=sliding_window,
)
def window_to_both_sides(model: Transformer) -> None:
    attend_with(model, LooksAhead)


@bug(
    "a fast path for a single query drops the window: decoding sees every cached key",
    check_cached_decoding_equals_full,
    of=sliding_window,
)
def window_lost_in_decoding(model: Transformer) -> None:
    class Fast(WindowAttention):
        def near(self, T: int, S: int, device: torch.device) -> Tensor:
            near = super().near(T, S, device)
            return near if T > 1 else torch.ones_like(near)

    attend_with(model, Fast)
