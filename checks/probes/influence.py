"""Which token influences which logit: tokens are changed one at a time and the logits before and after compared.

Rows are stacked for speed. leaks.py confirms what this finds by separate calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..subject import Subject
from ..watch.draws import seeded
from ..ways import EVAL, TRAIN, Way
from .module_state import buffers_kept, set_mode

Item = TypeVar("Item")
LONGEST = 16  # tokens; every pair of positions is tried in sequences up to this length
STACKED = 8192  # tokens in one call, at most
NUMBERS = 2**24  # logits that one call may give, whatever the vocabulary: 128 MB in float64
LEAST = 4  # rows of a sample, whatever they cost
ROWS = 8  # of every length, where all lengths are to be affordable
SLOW_SHAPE = 0.1  # seconds of processor time; some implementations recompile for every new shape


def call(subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None = None, way: Way = EVAL) -> Tensor:
    """Logits [B, T, V], detached; dropout, if the way has any, is always drawn from the same seed."""
    kept = buffers_kept(model) if way.training else nullcontext()
    with seeded(subject.seed), torch.set_grad_enabled(way.graph), way.inside(), kept:
        set_mode(model, way.training)
        try:
            cache = subject.new_cache(model, len(tokens)) if way.cached else None
            return subject.logits(model, tokens, mask, cache, **way.more).detach()
        finally:
            set_mode(model, False)


def block_of_tokens(subject: Subject, rows: int, *, seed: int = 0) -> Tensor:
    """Random token ids [rows, block size]; `seed` is counted from the run's."""
    return subject.tokens(rows, subject.sizes.block_size, seed=subject.seed + seed)


def length(subject: Subject) -> int:
    """The longest sequence in which every pair of positions is tried."""
    return min(subject.sizes.block_size, LONGEST)


def lengths(subject: Subject, model: nn.Module) -> list[int]:
    """Every length from 1 on; only a few of them if each new shape is slow, or all of them cost too much."""
    T = length(subject)
    call(subject, model, subject.tokens(1, T))
    start = time.thread_time()
    call(subject, model, subject.tokens(1, max(T - 1, 1)))
    slow = time.thread_time() - start > SLOW_SHAPE
    shortest = 1 if reads_one_token(subject, model) else 2
    few = sorted({t for t in (1, 2, 3, T // 2, T - 1, T) if shortest <= t <= T})
    if subject.large:
        few = [t for t in few if t not in (3, T - 1)]
    every = list(range(shortest, T + 1))
    return few if slow or subject.affordable(sum(every), ROWS) < ROWS else every


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
    """[V, T] tokens in which every column contains every id once (a random choice of `rows` of them).

    Of a large model's ids there are as many rows as are affordable, the first and the last id among them.
    """
    V = subject.sizes.vocab_size
    generator = torch.Generator().manual_seed(seed)
    wanted = rows or V
    n = subject.affordable(T, wanted, least=min(wanted, LEAST))
    tokens = torch.stack([torch.randperm(V, generator=generator)[:n] for _ in range(T)], dim=1)
    if n < wanted:
        tokens[0, ::2], tokens[-1, 1::2] = 0, V - 1
    return tokens.to(subject.device)


@dataclass
class Changes:
    """Pairs of rows [N, T] that differ from one token on: pair n in that at `place[n]`, of a sample in all later ones.

    `stacked` is how many tokens one call may read; `of` how many pairs there would be, were all affordable.
    """

    plain: Tensor
    changed: Tensor
    place: Tensor
    mask: Tensor | None = None
    stacked: int = STACKED
    of: int = 0

    def part(self, rows: slice | Tensor) -> Changes:
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, plain=self.plain[rows], changed=self.changed[rows], place=self.place[rows], mask=mask)

    @property
    def rows_at_once(self) -> int:
        return max(self.stacked // self.plain.shape[1], 1)

    def parts(self) -> Iterator[Changes]:
        """Pieces that one call may read."""
        size = self.rows_at_once
        return (self.part(slice(i, i + size)) for i in range(0, len(self.place), size))

    def one_by_one(self) -> Iterator[Changes]:
        return (self.part(slice(i, i + 1)) for i in range(len(self.place)))

    @property
    def sample(self) -> dict[str, str]:
        """For the evidence: which part of the cases was tried, if not all; and what that can miss."""
        if len(self.place) >= self.of:
            return {}
        ids = len(torch.unique(torch.cat((self.plain, self.changed))))
        return {
            "sample": f"{len(self.place)} of {self.of} cases, each rewriting all tokens from one of "
            f"{len(torch.unique(self.place))} places on; {ids} ids: what happens for another id alone was not looked at"
        }

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
    alone: bool = False,
    sweeps: float = 1.0,
) -> Changes:
    """Every row of tokens [R, T] with one real token replaced, at each of the places, by `alternatives` other ids.

    Where, by these `sweeps`, that costs too much, some of these, at as many places as can be; and then all tokens from
    the place on are replaced, unless one `alone` is to be: so every pair of positions on two sides of the place is
    tried at once.
    """
    (R, T), V = tokens.shape, subject.sizes.vocab_size
    offsets = torch.arange(1, V)[torch.linspace(0, V - 2, alternatives).long()] if V > 1 else torch.zeros(1).long()
    last_first = torch.tensor(sorted(places or range(T), reverse=True))  # so that the first row has a past to judge
    row, place, offset = (
        grid.flatten().to(tokens.device) for grid in torch.meshgrid(torch.arange(R), last_first, offsets, indexing="ij")
    )
    if mask is not None:
        row, place, offset = (grid[mask[row, place]] for grid in (row, place, offset))
    wanted, least = len(row), len(last_first) if alone else LEAST
    if (few := subject.affordable(2 * T, wanted, least=least, sweeps=sweeps)) < wanted:
        chosen = spread_over(place, few, seed=subject.seed)
        row, place, offset = row[chosen], place[chosen], offset[chosen]
    plain, n = tokens[row], torch.arange(len(row), device=tokens.device)
    if few < wanted and not alone:
        later = torch.arange(T, device=tokens.device) >= place[:, None]
        changed = torch.where(later, (plain + offset[:, None]) % V, plain)
    else:
        changed = plain.clone()
        changed[n, place] = (changed[n, place] + offset) % V
    return Changes(plain, changed, place, None if mask is None else mask[row], tokens_at_once(subject), wanted)


def spread_over(place: Tensor, n: int, *, seed: int) -> Tensor:
    """The indices of `n` entries, in their order: as many places as can be, the last and the second in any case."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(len(place), generator=generator).to(place.device)
    by_place: dict[int, list[int]] = {}
    for index in mixed.tolist():
        by_place.setdefault(int(place[index]), []).append(index)
    ends = [s for s in (max(by_place), 1) if s in by_place]
    order = [*ends, *(s for s in by_place if s not in ends)]
    rounds = zip_longest(*(by_place[s] for s in order))
    return torch.tensor(sorted([i for i in chain.from_iterable(rounds) if i is not None][:n]), device=place.device)


def tried_at(subject: Subject, T: int, *, rows: int, sweeps: float = 1.0) -> Changes:
    """Changes of every token in rows of T tokens, of every id if there are as many rows."""
    return changes(subject, every_id(subject, T, rows=rows, seed=subject.seed + T), sweeps=sweeps)


def cuts(subject: Subject, T: int, places: list[int]) -> Changes:
    """One sequence, rewritten from each place on: whatever a position sees of its future, some row changes."""
    plain = subject.tokens(1, T, seed=subject.seed).expand(len(places), T).contiguous()
    place = torch.tensor(places, device=plain.device)
    later = torch.arange(T, device=plain.device) >= place[:, None]
    return Changes(plain, torch.where(later, (plain + 1) % subject.sizes.vocab_size, plain), place)


def some_of(items: list[Item], n: int, *, seed: int) -> list[Item]:
    """The first, the last and others drawn by the seed, `n` in all and in their order; all of them if n is enough."""
    if n >= len(items):
        return items
    inner = torch.randperm(len(items) - 2, generator=torch.Generator().manual_seed(seed))[: max(n - 2, 0)] + 1
    return [items[i] for i in sorted({0, len(items) - 1, *inner.tolist()})]


def tokens_at_once(subject: Subject) -> int:
    """How many tokens one call may read, so that its logits stay in bounds."""
    return min(STACKED, max(NUMBERS // max(subject.width, 1), 1))


def moved(one: Tensor, other: Tensor) -> Tensor:
    """[N, T]: the largest change of each position's logits [N, T, V]; infinite if only one of two numbers is NaN."""
    if one.dim() == 3 and one.numel() > NUMBERS:  # several copies of them are made
        few = max(NUMBERS // 8 // (one.shape[0] * one.shape[2]), 1)
        pieces = zip(torch.split(one, few, dim=1), torch.split(other, few, dim=1), strict=True)
        return torch.cat([moved(a, b) for a, b in pieces], dim=1)
    apart = (one - other).abs().double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=torch.inf)).amax(dim=-1)


def measure(subject: Subject, model: nn.Module, tried: Changes, way: Way, *, alone: bool = False) -> Tensor:
    """[N, T]: how far a changed token moved the logits at each position; `alone`: one row per call."""
    if not len(tried.place):
        return torch.zeros(tried.plain.shape, dtype=torch.float64)
    found: list[Tensor] = []
    before, plain = None, None
    for piece in tried.one_by_one() if alone else tried.parts():
        if plain is None or before is None or piece.mask is not None or not torch.equal(before, piece.plain):
            before, plain = piece.plain, call(subject, model, piece.plain, piece.mask, way)
        found.append(moved(plain, call(subject, model, piece.changed, piece.mask, way)))
    return torch.cat(found)


def influence(moves: Tensor, place: Tensor) -> Tensor:
    """[T, T], row t, column s: the largest change of the logits at t when token s was changed."""
    T = moves.shape[1]
    columns = [moves[place == s].amax(dim=0) if bool((place == s).any()) else moves.new_zeros(T) for s in range(T)]
    return torch.stack(columns, dim=1)


def in_deviations(pairs: Tensor, unit: float) -> list[list[float]]:
    """Row t, column s: how far token s moves the logits at t, in standard deviations of the logits."""
    return [[float(f"{float(x) / unit:.3g}") for x in row] for row in pairs]


def only_training_sees_the_future(subject: Subject, model: nn.Module, tokens: Tensor) -> bool:
    """Whether another last token moves earlier logits in train mode, and none in eval mode."""
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % subject.sizes.vocab_size
    seen = [
        not torch.equal(*(call(subject, model, each, way=way)[:, :-1] for each in (tokens, other)))
        for way in (EVAL, TRAIN)
    ]
    return seen == [False, True]
