"""State that a model keeps and should not: one call changes what the next one returns."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import GeluFeedForward, Rotation, Transformer
from ..check_contract import check_earlier_calls_leave_no_trace
from ..check_devices import check_memory_does_not_grow
from ..check_distributed import check_two_processes_train_as_one
from ..check_modes import check_forward_leaves_weights_alone
from . import bug
from .damage import blocks, redefine

# -- kept from one call for the next


@bug("the mean of the last batch is kept on the model and added to the next", check_earlier_calls_leave_no_trace)
def state_leaks_between_calls(model: Transformer) -> None:
    class Remembers(Transformer):
        seen: Tensor | float = 0.0

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            before, self.seen = self.seen, 0.1 * x.detach().mean(dim=(0, 1))
            return x + before

    model.__class__ = Remembers


@bug("the mask of the first padded batch is kept and used for all later ones", check_earlier_calls_leave_no_trace)
def mask_kept_from_the_first_call(model: Transformer) -> None:
    class Keeps(Transformer):
        kept: Tensor | None = None

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            visible = super().visible(mask, T, S, device)
            if mask is not None and self.kept is None:
                self.kept = visible
            kept = self.kept
            return kept[-1:] if kept is not None and kept.shape[-2:] == (T, S) else visible

    model.__class__ = Keeps


@bug(
    "positions are squeezed for a text of more than 64 tokens, and stay so for shorter ones",
    check_earlier_calls_leave_no_trace,
    positions="rotary",
)
def scale_stays_after_a_long_text(model: Transformer) -> None:
    rotation, longest = model.positions.rotation, 64

    def squeezed(self: object, positions: Tensor, dtype: torch.dtype) -> Rotation:
        nonlocal longest
        longest = max(longest, positions.shape[-1])
        turned: Rotation = rotation(positions * (64 / longest), dtype)
        return turned

    redefine(model.positions, rotation=squeezed)


@bug("a single token's embedding is kept and added in the next call", check_earlier_calls_leave_no_trace)
def decoding_state_left_behind(model: Transformer) -> None:
    class Decodes(Transformer):
        left: Tensor | float = 0.0

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            before, self.left = self.left, x.detach().mean(dim=(0, 1)) if tokens.shape[1] == 1 else 0.0
            return x + before

    model.__class__ = Decodes


@bug(
    "a hook on backward sets a flag on the model, which changes all later forwards", check_earlier_calls_leave_no_trace
)
def backward_leaves_a_mark(model: Transformer) -> None:
    class Marked(Transformer):
        marked = False

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            if x.requires_grad and self.training:
                x.register_hook(lambda gradient: setattr(self, "marked", True))  # type: ignore[no-untyped-call]
            return 1.1 * x if self.marked else x

    model.__class__ = Marked


@bug("every forward appends its activations to a list that is never emptied: memory grows", check_memory_does_not_grow)
def forward_keeps_its_activations(model: Transformer) -> None:
    kept: list[Tensor] = []

    class Keeping(GeluFeedForward):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(super().forward(x))
            return kept[-1]

    for block in blocks(model):
        block.feed_forward.__class__ = Keeping


# -- statistics and weights changed by a forward


@bug("embeddings are centred by a running mean that eval mode updates too", check_earlier_calls_leave_no_trace)
def eval_updates_running_statistics(model: Transformer) -> None:
    class Centred(Transformer):
        mean: Tensor

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            out = x - self.mean
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            return out

    model.register_buffer("mean", torch.zeros(model.config.n_embd))
    model.__class__ = Centred


@bug("embeddings are centred by a running mean, which differs between processes", check_two_processes_train_as_one)
def running_statistics_in_forward(model: Transformer) -> None:
    class Centred(Transformer):
        running_mean: Tensor

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            if self.training:
                self.running_mean.lerp_(x.detach().mean((0, 1)), 0.5)
            return x - self.running_mean.clone()

    model.__class__ = Centred
    model.register_buffer("running_mean", torch.zeros(model.config.n_embd))


@bug("every forward normalizes the embedding's weights in place", check_forward_leaves_weights_alone)
def forward_changes_weights(model: Transformer) -> None:
    class Normalizing(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            with torch.no_grad():
                self.embedding.weight.mul_(0.5 + 0.5 / self.embedding.weight.norm(dim=1, keepdim=True))
            return super().embed(tokens)

    model.__class__ = Normalizing
