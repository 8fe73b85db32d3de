"""Mistakes in the forward as a whole: shapes, lengths, ids, what it remembers, and what it throws away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.model import Block, KeyValueCache, Rotation, Transformer
from . import bug
from .designs import TaughtTransformer, taught
from .masking import CAUSAL, ROWS

SHAPE = "check_contract.check_logits_have_shape"
LENGTHS = "check_contract.check_every_length_is_read"
FINITE = "check_contract.check_logits_are_finite"
TRACE = "check_contract.check_earlier_calls_leave_no_trace"
INPUTS = "check_contract.check_inputs_are_left_alone"
TOO_LONG = "check_contract.check_too_long_a_sequence_is_no_silent_error"
UNKNOWN = "check_contract.check_unknown_token_ids_are_refused"
RESTORED = "check_contract.check_state_dict_restores_the_model"
COPIES = "check_contract.check_copies_are_independent"
BLOCKS = "check_contract.check_every_block_matters"
RIGHT = "check_masking.check_right_padding_changes_nothing"


# -- shapes and lengths


@bug("logits-time-first", "the logits come as [T, B, V]", caught_by=(SHAPE,), model=True)
def time_first(model: Transformer) -> None:
    class TimeFirst(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).transpose(0, 1)

    model.__class__ = TimeFirst


@bug("logits-last-position-only", "only the last position's logits come back, as decoding would want them",
     caught_by=(SHAPE,), model=True)  # fmt: skip
def last_position_only(model: Transformer) -> None:
    class LastOnly(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given)[:, -1:]

    model.__class__ = LastOnly


@bug("logits-rounded", "the logits are whole numbers", caught_by=(SHAPE,), model=True)
def rounded(model: Transformer) -> None:
    class Rounded(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).round().long()

    model.__class__ = Rounded


@bug("length-one-squeezed", "axes of size 1 are squeezed: a sequence of one token loses an axis",
     caught_by=(LENGTHS,), model=True)  # fmt: skip
def squeezed(model: Transformer) -> None:
    class Squeezed(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).squeeze(1)

    model.__class__ = Squeezed


@bug("block-size-off-by-one", "a sequence of exactly the block size is refused", caught_by=(LENGTHS,), model=True)
def refuses_the_longest(model: Transformer) -> None:
    class Refuses(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            super().refuse_bad_input(tokens, mask, cache)
            if tokens.shape[1] >= self.config.block_size:
                raise ValueError(f"{tokens.shape[1]} tokens do not fit")

    model.__class__ = Refuses


@bug("too-long-cut-silently", "of a sequence beyond the block size the end is dropped without a word",
     caught_by=(TOO_LONG,), model=True)  # fmt: skip
def cut_silently(model: Transformer) -> None:
    class Cuts(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            block = self.config.block_size
            return super().forward(tokens[:, :block], None if mask is None else mask[:, :block], cache)

    model.__class__ = Cuts


@bug("too-long-read-wrong", "beyond the block size positions count back from its end, and nothing is said",
     caught_by=(TOO_LONG,), model=True)  # fmt: skip
def read_wrong(model: Transformer) -> None:
    class Shifts(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            pass

        def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
            return (super().token_positions(mask, T, S, device) - max(T - self.config.block_size, 0)).clamp(min=0)

    model.__class__ = Shifts


# -- token ids


@bug("token-ids-wrapped", "ids are taken modulo the vocabulary size", caught_by=(UNKNOWN,), model=True)
def ids_wrapped(model: Transformer) -> None:
    class Wrapped(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens % self.config.vocab_size)

    model.__class__ = Wrapped


@bug("token-ids-clamped", "ids beyond the vocabulary are read as its last symbol", caught_by=(UNKNOWN,), model=True)
def ids_clamped(model: Transformer) -> None:
    class Clamped(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.clamp(max=self.config.vocab_size - 1))

    model.__class__ = Clamped


@bug("first-token-masked-out", "symbol 0 is taken for padding wherever it stands: first in a row, it sees nothing",
     caught_by=(FINITE,), model=True, attention="explicit")  # fmt: skip
def symbol_masked(model: Transformer) -> None:
    class TakesForPadding(Transformer):
        tokens: Tensor | None = None

        def embed(self, tokens: Tensor) -> Tensor:
            self.tokens = tokens
            return super().embed(tokens)

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            assert self.tokens is not None
            seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
            return seen & (self.tokens != 0)[:, None, None, :]

    model.__class__ = TakesForPadding


# -- what is remembered, and what is changed


@bug("state-leaks-between-calls", "the mean of the last batch stays on the model and is added to the next",
     caught_by=(TRACE,), model=True)  # fmt: skip
def remembers(model: Transformer) -> None:
    class Remembers(Transformer):
        seen: Any = 0.0

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            before, self.seen = self.seen, 0.1 * x.detach().mean(dim=(0, 1))
            return x + before

    model.__class__ = Remembers


@bug("mask-kept-from-the-first-call", "the mask of the first padded call stays on the model and is used ever after",
     caught_by=(TRACE,), model=True)  # fmt: skip
def mask_kept(model: Transformer) -> None:
    class Keeps(Transformer):
        kept: Tensor | None = None

        def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
            visible = super().visible(mask, T, S, device)
            if mask is not None and self.kept is None:
                self.kept = visible
            fits = self.kept is not None and self.kept.shape[-2:] == (T, S)
            return self.kept[-1:] if fits else visible  # type: ignore[index]

    model.__class__ = Keeps


@bug("decoding-state-left-behind", "a call with a single token leaves its embedding for the next call",
     caught_by=(TRACE,), model=True)  # fmt: skip
def decoding_state(model: Transformer) -> None:
    class Decodes(Transformer):
        left: Any = 0.0

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            before, self.left = self.left, x.detach().mean(dim=(0, 1)) if tokens.shape[1] == 1 else 0.0
            return x + before

    model.__class__ = Decodes


@bug("backward-leaves-a-mark", "a hook of the backward switches the forward over",
     caught_by=(TRACE,), model=True)  # fmt: skip
def backward_marks(model: Transformer) -> None:
    class Marked(Transformer):
        marked = False

        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            if x.requires_grad and self.training:
                x.register_hook(lambda gradient: setattr(self, "marked", True))
            return 1.1 * x if self.marked else x

    model.__class__ = Marked


@bug("tokens-changed-in-place", "negative ids are replaced in the caller's own tensor, and so is id 1",
     caught_by=(INPUTS,), model=True)  # fmt: skip
def tokens_changed(model: Transformer) -> None:
    class Changes(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return super().embed(tokens.masked_fill_(tokens == 1, 0))

    model.__class__ = Changes


@bug("mask-changed-in-place", "the first token is marked as real in the caller's own mask",
     caught_by=(INPUTS,), model=True)  # fmt: skip
def mask_changed(model: Transformer) -> None:
    class Changes(Transformer):
        def refuse_bad_input(self, tokens: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> None:
            if mask is not None:
                mask[:, 0] = True
            super().refuse_bad_input(tokens, mask, cache)

    model.__class__ = Changes


@bug("targets-changed-in-place", "targets that count for nothing are set to -100 in the caller's own tensor",
     caught_by=(INPUTS,), model=True, of=taught)  # fmt: skip
def targets_changed(model: Transformer) -> None:
    class Changes(TaughtTransformer):
        def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            targets[targets == 0] = -100
            return logits

    model.__class__ = Changes


@bug("state-dict-does-not-load", "what the constructor adds depends on its random state, and so do the names saved",
     caught_by=(RESTORED,))  # fmt: skip
def names_differ(parts: SimpleNamespace) -> None:
    build = parts.build_model

    def build_model(**sizes: Any) -> nn.Module:
        model = build(**sizes)
        name = f"scratch_{torch.randint(2**30, ())}"
        model.register_buffer(name, torch.zeros(()))
        return model

    parts.build_model = build_model


@bug("copy-calls-the-original", "the model keeps a bound method of itself: a copy of it still calls the first",
     caught_by=(COPIES,), model=True)  # fmt: skip
def keeps_bound_method(model: Transformer) -> None:
    class Original:
        def __init__(self, embedding: nn.Module) -> None:
            self.embedding = embedding

        def __deepcopy__(self, memo: dict) -> Original:
            return self

    class Bound(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            return self.original.embedding(tokens)  # type: ignore[operator, union-attr]

    model.__dict__["original"] = Original(model.embedding)
    model.__class__ = Bound


# -- what is thrown away


@bug("block-output-discarded", "the last block is run and the stream before it is kept",
     caught_by=(BLOCKS,), model=True)  # fmt: skip
def output_discarded(model: Transformer) -> None:
    class Discards(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            super().forward(x, rotate, visible, cache)
            return x

    model.blocks[-1].__class__ = Discards  # type: ignore[assignment]


@bug("block-never-runs", "the loop over the blocks stops before the last", caught_by=(BLOCKS,), model=True)
def never_runs(model: Transformer) -> None:
    class Stops(nn.ModuleList):
        def __iter__(self):
            return iter(list(super().__iter__())[:-1])

    model.blocks.__class__ = Stops


# -- what comes from elsewhere


@bug("batch-statistics", "the stream is centred by the mean over the rows of the batch",
     caught_by=(ROWS,), model=True)  # fmt: skip
def centred_over_rows(model: Transformer) -> None:
    class Centred(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x - x.mean(dim=0, keepdim=True)

    model.__class__ = Centred


@bug("look-ahead-shift", "each token is mixed with the next instead of the one before it",
     caught_by=(CAUSAL,), model=True)  # fmt: skip
def shifted_ahead(model: Transformer) -> None:
    class Shifted(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            ahead = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), dim=1)
            return super().forward(x + ahead, rotate, visible, cache)

    for block in model.blocks:
        block.__class__ = Shifted


@bug("pads-counted-in-a-mean", "a running mean of the past is added that counts padding on the left",
     caught_by=("check_masking.check_pad_contents_change_nothing",), model=True)  # fmt: skip
def pads_counted(model: Transformer) -> None:
    class Counts(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]

    model.__class__ = Counts
