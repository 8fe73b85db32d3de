"""Texts read whole and read in pieces through a key-value cache, and how far the two may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import Bound, NotApplicable
from ..subject import Subject
from .precision import FINENESS, Coarsest, precision, spread

LONGEST = 24  # tokens
# Standard deviations of the logits, by the coarsest type on the way; correct caches stay below a tenth of it.
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Reader:
    """Reads texts with an amplified model, with and without its cache."""

    subject: Subject
    model: nn.Module
    inside: torch.dtype  # the coarsest type on the way through the cache
    dtype: torch.dtype  # of the weights

    @torch.no_grad()
    def whole(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V], without a cache."""
        return self.subject.logits(self.model, tokens, mask)

    @torch.no_grad()
    def pieces(self, tokens: Tensor, pieces: Sequence[int], mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """The same through a cache, in pieces of these sizes; ∞ where a call returns logits for its last token only."""
        cache = self.new_cache(len(tokens)) if cache is None else cache
        ends = torch.tensor([0, *pieces]).cumsum(0).tolist()
        found = []
        for start, end in pairwise(ends):
            part = None if mask is None else mask[:, start:end].contiguous()
            logits = self.subject.logits(self.model, tokens[:, start:end].contiguous(), part, cache)
            missing = end - start - logits.shape[1]
            found += [logits.new_full((len(tokens), missing, logits.shape[2]), torch.inf), logits]
        return torch.cat(found, dim=1)

    def new_cache(self, batch_size: int) -> Any:
        return self.subject.new_cache(self.model, batch_size)

    def bound(self, logits: Tensor) -> Bound:
        factor = ALLOWED[self.inside]
        kind = str(self.inside).removeprefix("torch.")
        return Bound(factor * spread(logits), f"{factor:.0e} standard deviations of the logits, {kind} on the way")

    def sharp(self, **sizes: Any) -> Reader:
        """The same with a new model, of these sizes."""
        return Reader(self.subject, fresh(self.subject, self.dtype, **sizes), self.inside, self.dtype)


def reader(subject: Subject) -> Reader:
    """One for all checks of a subject. Raises NotApplicable without a cache, or with too short a block."""
    known = subject.once(_reader)
    return known if subject.builds_afresh else known.sharp()  # other checks have changed the instance's weights


def _reader(subject: Subject) -> Reader:
    """Tries to read a text through the cache in the subject's precision, then in float32."""
    if not subject.causal:
        raise NotApplicable("declared as not causal: later tokens change earlier logits, so no cache can be exact")
    T = length(subject)
    if subject.new_cache(fresh(subject, precision(subject).dtype), 1) is None:
        raise NotApplicable(subject.without_cache)
    for dtype in dict.fromkeys((precision(subject).dtype, torch.float32)):
        made = Reader(subject, fresh(subject, dtype), torch.float32, dtype)
        try:
            with Coarsest(max(precision(subject).inside, dtype, key=FINENESS.index)) as seen:
                made.pieces(subject.tokens(2, T), [2, *[1] * (T - 2)])
        except Exception:
            if dtype == torch.float32:
                raise
            continue
        return Reader(subject, made.model, seen.dtype, dtype)
    raise AssertionError("unreachable: float32 returns or raises")


def expect_cache(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable without a cache, and with one that no text can be read into, which is told elsewhere."""
    cache = subject.new_cache(model, 1)
    if cache is None:
        raise NotApplicable(subject.without_cache)
    try:
        with torch.no_grad():
            subject.logits(model, subject.tokens(1, 2), cache=cache)
    except Exception as error:
        raise NotApplicable(f"no text can be read into its cache: {type(error).__name__}: {error}") from None


def with_cache(subject: Subject) -> nn.Module:
    """An amplified model in the type that its cache takes. Raises NotApplicable as `expect_cache` does."""
    try:
        return reader(subject).model
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"no text can be read into its cache: {type(error).__name__}: {error}") from None


def fresh(subject: Subject, dtype: torch.dtype, **sizes: Any) -> nn.Module:
    return subject.amplified(seed=subject.seed, dtype=dtype, **sizes)


def length(subject: Subject) -> int:
    """The length of the texts: the block size, at most 24."""
    T = min(subject.sizes.block_size, LONGEST)
    if T < 3:
        raise NotApplicable(f"a block size of {T} is too short to read a text in pieces")
    return T


def distances(got: Tensor, want: Tensor) -> Tensor:
    """[B, T]: how far apart two logits are; ∞ if only one of them is NaN, 0 where a call returned none."""
    given = ~got.isposinf().all(dim=-1, keepdim=True)
    apart = torch.where(got.isnan() & want.isnan(), 0.0, (got - want).abs().nan_to_num(nan=torch.inf))
    return torch.where(given, apart, 0.0).amax(dim=-1)


def difference(got: Tensor, want: Tensor) -> float:
    return float(distances(got, want).max())


def first_wrong(got: Tensor, want: Tensor, size: float, real: Tensor | None = None) -> tuple[int, int] | None:
    """The row and position of the first logits of real tokens that are too far apart."""
    wrong = distances(got, want) > size
    if real is not None:
        wrong = wrong & real
    if not bool(wrong.any()):
        return None
    position = int(wrong.any(dim=0).int().argmax())
    return int(wrong[:, position].int().argmax()), position


def apart(got: Tensor, want: Tensor, at: tuple[int, int]) -> str:
    """How far apart the logits are at a row and a position, as a phrase."""
    return f"by {float(distances(got, want)[at]) / spread(want):.2g} standard deviations of the logits"
