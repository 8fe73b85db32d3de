"""Wrong inputs and outputs of a forward: shapes, lengths, unknown token ids, tensors changed in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...transformer.model import KeyValueCache, Transformer
from ..check_contract import (
    check_every_length_is_read,
    check_inputs_are_left_alone,
    check_logits_have_shape,
    check_too_long_a_sequence_is_no_silent_error,
    check_unknown_token_ids_are_refused,
)
from ..check_spec import check_last_position_agrees
from . import bug
from .damage import GPT2, redefine
from .designs import KeepingTransformer, PlacedTransformer, TaughtTransformer, keeping, placed, taught

# -- the shape of the logits


@bug("logits have the shape [T, B, V] instead of [B, T, V]", check_logits_have_shape)
def logits_time_first(model: Transformer) -> None:
    class TimeFirst(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).transpose(0, 1)

    model.__class__ = TimeFirst


@bug("only the last position's logits are returned, as decoding would want them", check_logits_have_shape)
def logits_last_position_only(model: Transformer) -> None:
    class LastOnly(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given)[:, -1:]

    model.__class__ = LastOnly


@bug("axes of size 1 are squeezed: a sequence of one token loses its time axis", check_every_length_is_read)
def length_one_squeezed(model: Transformer) -> None:
    class Squeezed(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).squeeze(1)

    model.__class__ = Squeezed


@bug("asked for the last position only, the model returns the first", check_last_position_agrees, of=keeping, **GPT2)
def last_position_is_the_first(model: KeepingTransformer) -> None:
    redefine(model, keep=lambda self, logits, n: logits[:, :n] if n else logits)


@bug("asked for last positions only, the model repeats the last row", check_last_position_agrees, of=keeping, **GPT2)
def last_position_of_the_last_row(model: KeepingTransformer) -> None:
    redefine(model, keep=lambda self, logits, n: logits[-1:, -n:].expand(len(logits), -1, -1) if n else logits)


# -- the length


@bug("a sequence of exactly the block size is refused", check_every_length_is_read)
def block_size_off_by_one(model: Transformer) -> None:
    class Refuses(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            super().refuse_bad_input(tokens, mask, cache)
            if tokens.shape[1] >= self.config.block_size:
                raise ValueError(f"{tokens.shape[1]} tokens do not fit")

    model.__class__ = Refuses


@bug("sequences longer than the block size are silently cut off", check_too_long_a_sequence_is_no_silent_error)
def too_long_cut_silently(model: Transformer) -> None:
    class Cuts(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            block = self.config.block_size
            return super().forward(tokens[:, :block], None if mask is None else mask[:, :block], cache)

    model.__class__ = Cuts


@bug("sequences longer than the block size silently get wrong positions", check_too_long_a_sequence_is_no_silent_error)
def too_long_read_wrong(model: Transformer) -> None:
    class Shifts(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            pass

        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return (super().token_positions(mask, T, S, device) - max(T - self.config.block_size, 0)).clamp(min=0)

    model.__class__ = Shifts


# -- token ids


@bug("token ids outside the vocabulary are silently taken modulo its size", check_unknown_token_ids_are_refused)
def token_ids_wrapped(model: Transformer) -> None:
    class Wrapped(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens % self.config.vocab_size)

    model.__class__ = Wrapped


@bug("token ids outside the vocabulary are silently read as its last one", check_unknown_token_ids_are_refused)
def token_ids_clamped(model: Transformer) -> None:
    class Clamped(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.clamp(max=self.config.vocab_size - 1))

    model.__class__ = Clamped


# -- tensors changed in place


@bug("the caller's token ids are changed in place: 1 becomes 0", check_inputs_are_left_alone)
def tokens_changed_in_place(model: Transformer) -> None:
    class Changes(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.masked_fill_(tokens == 1, 0))

    model.__class__ = Changes


@bug("the caller's mask is changed in place: its first token is marked as real", check_inputs_are_left_alone)
def mask_changed_in_place(model: Transformer) -> None:
    class Changes(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            if mask is not None:
                mask[:, 0] = True
            super().refuse_bad_input(tokens, mask, cache)

    model.__class__ = Changes


@bug("the caller's targets are changed in place: those to ignore become -100", check_inputs_are_left_alone, of=taught)
def targets_changed_in_place(model: Transformer) -> None:
    class Changes(TaughtTransformer):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            targets[targets == 0] = -100
            return logits

    model.__class__ = Changes


@bug(
    "the caller's position ids are changed in place (+= 1): the next call counts from 2",
    check_inputs_are_left_alone,
    source="https://github.com/open-edge-platform/physical-ai-studio/issues/589",
    of=placed,
)
def position_ids_mutated_in_place(model: Transformer) -> None:
    class Mutates(PlacedTransformer):
        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            positions = super().token_positions(mask, T, S, device)
            positions += 1
            return positions - 1

    model.__class__ = Mutates
