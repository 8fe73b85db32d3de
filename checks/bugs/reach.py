"""Mistakes at how far a token sees: windows, what of the past is out of reach, documents packed into one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...transformer.model import ExplicitAttention, Transformer, causal_mask
from . import bug
from .designs import PackedTransformer, WindowAttention, packed, sliding_window
from .masking import CAUSAL, PACKED, PAST, WINDOW, attend_with

# -- what is out of reach


@bug("attention-sees-itself-only", "the mask is the diagonal: no token reads what came before it",
     caught_by=(PAST,), model=True, attention="explicit")  # fmt: skip
def sees_itself_only(model: Transformer) -> None:
    class Itself(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return super().mask(scores, visible & visible.new_ones(scores.shape[-2:]).triu())

    attend_with(model, Itself)


@bug("first-token-never-seen", "the first key is masked out for every later query",
     caught_by=(PAST,), model=True, attention="explicit")  # fmt: skip
def first_never_seen(model: Transformer) -> None:
    class Skips(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            visible = visible.clone()
            visible[..., 1:, 0] = False
            return super().mask(scores, visible)

    attend_with(model, Skips)


@bug("late-tokens-never-seen", "the mask is a table of 64 tokens: those behind see themselves and no one else",
     caught_by=(PAST,), model=True, attention="explicit")  # fmt: skip
def late_never_seen(model: Transformer) -> None:
    class Short(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            itself = torch.eye(*scores.shape[-2:], dtype=torch.bool, device=scores.device)
            early = torch.arange(scores.shape[-1], device=scores.device) < 64
            return super().mask(scores, visible & (early | itself))

    attend_with(model, Short)


def look_through(model: nn.Module, near: Callable[[int, int, int, torch.device], Tensor]) -> None:
    """Gives every layer a window of another shape: near(window, T, S, device) is [T, S]."""

    class Other(WindowAttention):
        def near(self, T: int, S: int, device: torch.device) -> Tensor:
            return near(self.window, T, S, device)

    attend_with(model, Other)


@bug(
    "window-off-by-one",
    "a window of w tokens shows w - 1 of them, the token itself among them",
    source="https://github.com/huggingface/transformers/issues/39408 ; https://github.com/ml-explore/mlx-lm/pull/390",
    caught_by=(WINDOW,),
    model=True,
    of=sliding_window,
)
def window_off_by_one(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: ~causal_mask(T, S, device).tril(S - T - window + 1))


@bug("window-doubled", "the window reaches twice as far back as it says, as a window to both sides would",
     caught_by=(WINDOW,), model=True, of=sliding_window)  # fmt: skip
def window_doubled(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: ~causal_mask(T, S, device).tril(S - T - 2 * window))


@bug(
    "window-ignored",
    "a window is configured, and all of the past is seen",
    source="https://github.com/unslothai/unsloth/pull/8253",
    caught_by=(WINDOW,),
    model=True,
    of=sliding_window,
)
def window_ignored(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: torch.ones(T, S, dtype=torch.bool, device=device))


@bug("window-off-by-one-in-one-layer", "the window of the last layer alone shows one token more",
     caught_by=(WINDOW,), model=True, of=sliding_window)  # fmt: skip
def last_window_off_by_one(model: Transformer) -> None:
    class OneMore(WindowAttention):
        def near(self, T: int, S: int, device: torch.device) -> Tensor:
            return ~causal_mask(T, S, device).tril(S - T - self.window - 1)

    attend_with(model, OneMore, slice(-1, None))


@bug(
    "window-sign-error",
    "the window is laid after the token: with the causal mask only the token itself is left",
    source="https://github.com/huggingface/transformers/pull/41228",
    caught_by=(PAST, WINDOW),
    model=True,
    of=sliding_window,
)
def window_ahead(model: Transformer) -> None:
    look_through(model, lambda window, T, S, device: torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T))


@bug("window-only-when-long", "a sequence of more than 64 tokens is read through a window that nothing declares",
     caught_by=("check_causality.check_prefix_gives_the_same_logits",), model=True, attention="explicit")  # fmt: skip
def window_when_long(model: Transformer) -> None:
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
    "window-to-both-sides",
    "the sliding layers mask by distance alone: the window shows as much of the future as of the past",
    source="https://github.com/huggingface/transformers/issues/31673",
    caught_by=(CAUSAL,),
    model=True,
    of=sliding_window,
)
def window_to_both_sides(model: Transformer) -> None:
    attend_with(model, LooksAhead)


# -- packed documents


@bug(
    "packing-cross-contamination",
    "documents packed into one row attend to each other",
    source="https://github.com/huggingface/transformers/pull/46634 ; https://github.com/huggingface/trl/issues/784",
    caught_by=(PACKED,),
    model=True,
    of=packed,
)
def documents_attend_to_each_other(model: Transformer) -> None:
    class Contaminated(PackedTransformer):
        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            return Transformer.visible(self, mask, T, S, device)

    model.__class__ = Contaminated


@bug(
    "packing-positions-not-reset",
    "positions run on from one packed document to the next",
    source="https://github.com/huggingface/nanoVLM/pull/204",
    caught_by=(PACKED,),
    model=True,
    of=packed,
)
def positions_run_on(model: Transformer) -> None:
    class RunOn(PackedTransformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return Transformer.token_positions(self, mask, T, S, device)

    model.__class__ = RunOn
