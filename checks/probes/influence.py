"""Which token influences which logit: tokens are changed one at a time and the logits before and after compared.

Rows are stacked for speed. leaks.py confirms what this finds by separate calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..subject import Subject
from ..watch.draws import seeded
from ..ways import EVAL, Way
from .module_state import buffers_kept, set_mode

LONGEST = 16  # tokens; every pair of positions is tried in sequences up to this length
STACKED = 8192  # tokens in one call, at most
NUMBERS = 2**24  # logits that one call may give, whatever the vocabulary: 128 MB in float64
LEAST = 4  # rows of a sample, whatever they cost
ROWS = 8  # of every length, where all lengths are to be affordable
SLOW_SHAPE = 0.1  # seconds of processor time; some implementations recompile for every new shape


def call(subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None = None, way: Way = EVAL) -> Tensor:
    """Logits [B, T, V] without a graph; dropout, if the way has any, is always drawn from the same seed."""
    kept = buffers_kept(model) if way.training else nullcontext()
    with seeded(subject.seed), torch.no_grad(), way.inside(), kept:
        set_mode(model, way.training)
        try:
            cache = subject.new_cache(model, len(tokens)) if way.cached else None
            return subject.logits(model, tokens, mask, cache, **way.more)
        finally:
            set_mode(model, False)


def block_of_tokens(subject: Subject, rows: int, *, seed: int = 0) -> Tensor:
    """Random token ids [rows, block size]; `seed` is counted from the run's."""
    return subject.tokens(rows, subject.sizes.block_size, seed=subject.seed + seed)


def length(subject: Subject) -> int:
    """The longest sequence in which every pair of positions is tried."""
    return min(subject.sizes.block_size, LONGEST)


def lengths(subject: Subject, model: nn.Module) -> list[int]:
    """Every length from 1 on; only a few of them if each new shape is slow."""
    T = length(subject)
    call(subject, model, subject.tokens(1, T))
    start = time.thread_time()
    call(subject, model, subject.tokens(1, max(T - 1, 1)))
    slow = time.thread_time() - start > SLOW_SHAPE
    shortest = 1 if reads_one_token(subject, model) else 2
    few = sorted({t for t in (1, 2, 3, T // 2, T - 1, T) if shortest <= t <= T})
    return few if slow else list(range(shortest, T + 1))


def reads_one_token(subject: Subject, model: nn.Module) -> bool:
    """Some models refuse a sequence of one token with an error."""
    try:
        call(subject, model, subject.tokens(1, 1))
    except Exception:
        return False
    return True


def needs_one_token(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable if the model cannot decode from the begin token alone."""
    if not reads_one_token(subject, model):
        raise NotApplicable("decoding starts from one token, and the model refuses a sequence of one token")


def every_id(subject: Subject, T: int, *, rows: int | None = None, seed: int = 0) -> Tensor:
    """[V, T] tokens in which every column contains every id once (a random choice of `rows` of them)."""
    V = subject.sizes.vocab_size
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(V, generator=generator)[: rows or V] for _ in range(T)]
    return torch.stack(columns, dim=1).to(subject.device)


@dataclass
class Changes:
    """Pairs of rows [N, T] that differ in one token each: pair n in the token at `place[n]`."""

    plain: Tensor
    changed: Tensor
    place: Tensor
    mask: Tensor | None = None

    def part(self, rows: slice | Tensor) -> Changes:
        mask = None if self.mask is None else self.mask[rows]
        return Changes(self.plain[rows], self.changed[rows], self.place[rows], mask)

    def parts(self) -> Iterator[Changes]:
        """Pieces of at most STACKED tokens."""
        size = max(STACKED // self.plain.shape[1], 1)
        return (self.part(slice(i, i + size)) for i in range(0, len(self.place), size))

    def one_by_one(self) -> Iterator[Changes]:
        return (self.part(slice(i, i + 1)) for i in range(len(self.place)))

    def judged(self) -> Tensor:
        """[N, T], True for the logits that must not move: those of real tokens before the changed one."""
        before = torch.arange(self.plain.shape[1], device=self.place.device) < self.place[:, None]
        return before if self.mask is None else before & self.mask


def changes(
    subject: Subject,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    places: list[int] | None = None,
    alternatives: int = 2,
) -> Changes:
    """Every row of tokens [R, T] with one real token replaced, at each of the places, by `alternatives` other ids."""
    (R, T), V = tokens.shape, subject.sizes.vocab_size
    offsets = torch.arange(1, V)[torch.linspace(0, V - 2, alternatives).long()] if V > 1 else torch.zeros(1).long()
    last_first = torch.tensor(sorted(places or range(T), reverse=True))  # so that the first row has a past to judge
    row, place, offset = (
        grid.flatten().to(tokens.device) for grid in torch.meshgrid(torch.arange(R), last_first, offsets, indexing="ij")
    )
    if mask is not None:
        row, place, offset = (grid[mask[row, place]] for grid in (row, place, offset))
    plain, n = tokens[row], torch.arange(len(row), device=tokens.device)
    changed = plain.clone()
    changed[n, place] = (changed[n, place] + offset) % V
    return Changes(plain, changed, place, None if mask is None else mask[row])


def tried_at(subject: Subject, T: int, *, rows: int) -> Changes:
    """Changes of every token in rows of T tokens, of every id if there are as many rows."""
    return changes(subject, every_id(subject, T, rows=rows, seed=subject.seed + T))


def cuts(subject: Subject, T: int, places: list[int]) -> Changes:
    """One sequence, rewritten from each place on: whatever a position sees of its future, some row changes."""
    plain = subject.tokens(1, T, seed=subject.seed).expand(len(places), T).contiguous()
    place = torch.tensor(places, device=plain.device)
    later = torch.arange(T, device=plain.device) >= place[:, None]
    return Changes(plain, torch.where(later, (plain + 1) % subject.sizes.vocab_size, plain), place)


def moved(one: Tensor, other: Tensor) -> Tensor:
    """[N, T]: the largest change of each position's logits [N, T, V]; infinite if only one of two numbers is NaN."""
    apart = (one - other).abs().double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=torch.inf)).amax(dim=-1)


def measure(subject: Subject, model: nn.Module, tried: Changes, way: Way, *, alone: bool = False) -> Tensor:
    """[N, T]: how far a changed token moved the logits at each position; `alone`: one row per call."""
    if not len(tried.place):
        return torch.zeros(tried.plain.shape, dtype=torch.float64)
    pieces = tried.one_by_one() if alone else tried.parts()
    return torch.cat(
        [
            moved(call(subject, model, p.plain, p.mask, way), call(subject, model, p.changed, p.mask, way))
            for p in pieces
        ]
    )


def influence(moves: Tensor, place: Tensor) -> Tensor:
    """[T, T], row t, column s: the largest change of the logits at t when token s was changed."""
    T = moves.shape[1]
    columns = [moves[place == s].amax(dim=0) if bool((place == s).any()) else moves.new_zeros(T) for s in range(T)]
    return torch.stack(columns, dim=1)


def in_deviations(pairs: Tensor, unit: float) -> list[list[float]]:
    """Row t, column s: how far token s moves the logits at t, in standard deviations of the logits."""
    return [[float(f"{float(x) / unit:.3g}") for x in row] for row in pairs]
