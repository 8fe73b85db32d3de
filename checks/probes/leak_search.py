"""The search for a leak, a changed token that changes an earlier logit, and its confirmation.

What stacked rows show is confirmed by separate calls of equal shape that differ in a single token, so that neither
another row nor the rounding of another shape can be mistaken for the future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..expect import EQUAL_SHAPE, Bound, Where
from ..subject import Subject
from ..watch.arithmetic import same_arithmetic, same_draws
from ..watch.calls import first_breaking
from ..ways import EVAL, Way
from .influence import Changes, call, influence, measure, moved
from .precision import precision

SUSPECTS = 4  # hits to confirm one by one


@dataclass(frozen=True)
class LeakSearch:
    """What to change in which model, on which way, and what counts as a leak."""

    subject: Subject
    model: nn.Module
    tried: Changes
    way: Way = EVAL
    bound: Bound | None = None  # any larger change is a leak; by default, what rounding cannot explain
    exact: bool = True  # a smaller one is a leak too, if both calls repeat to the bit and did the same arithmetic
    alone: bool = False  # one row per call

    def run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return call(self.subject, self.model, tokens, mask, self.way)

    def find(self) -> tuple[Leak | None, Tensor]:
        """The first confirmed leak, if there is one, and how far every change moved every position [N, T]."""
        tried = self.tried
        moves = measure(self.subject, self.model, tried, self.way, alone=self.alone)
        early = torch.where(tried.judged(), moves, 0.0)
        if not bool(early.any()):
            return None, moves
        few = tried.part(slice(0, 8))
        loose = self.bound or precision(self.subject).bound(self.run(few.plain, few.mask), single=2e-5)
        found = (
            self._confirmed(candidate, row, bound)
            for bound in ([loose, EQUAL_SHAPE] if self.exact else [loose])
            for suspect in _suspects(early, tried.place, bound)
            for candidate, row in _separately(tried, suspect)
        )
        leak = next((leak for leak in found if leak is not None), None)
        if leak is not None:
            leak.pairs = influence(early, tried.place)
        return leak, moves

    def _confirmed(self, tried: Changes, row: int, bound: Bound) -> Leak | None:
        """The leak, if it shows again in two separate calls, and for the bound of 0 again in two more."""

        def plain() -> Tensor:
            return self.run(tried.plain, tried.mask)

        def changed() -> Tensor:
            return self.run(tried.changed, tried.mask)

        one, other = plain(), changed()
        early = torch.where(tried.judged()[row], moved(one, other)[row], 0.0)
        hits = (early > bound.size).nonzero()
        if not len(hits):
            return None
        if bound.size == 0:
            repeats = torch.equal(one, plain()) and torch.equal(other, changed())
            if not repeats or not same_arithmetic(plain, changed):
                return None
        if self.way.training and not same_draws(plain, changed):
            return None
        t = int(hits[0])
        return Leak(t, int(tried.place[row]), float(early[t]), bound, self, tried, row)


@dataclass
class Leak:
    """A changed token s that moved the logits at an earlier position t, by calls that differ in nothing else."""

    t: int
    s: int
    size: float  # how far, in logits
    bound: Bound
    search: LeakSearch
    tried: Changes  # one row, or the batch in which only row `row` was changed
    row: int
    pairs: Tensor = field(repr=False, default_factory=lambda: torch.zeros(0, 0))  # [T, T]: every hit, in logits

    @property
    def length(self) -> int:
        return self.tried.plain.shape[1]

    def plain(self) -> Tensor:
        """The logits before the change."""
        return self.search.run(self.tried.plain, self.tried.mask)

    def changed(self) -> Tensor:
        """The logits after it."""
        return self.search.run(self.tried.changed, self.tried.mask)

    def site(self) -> Where | None:
        """The first module whose output at an earlier position depends on token s while its input does not."""
        return first_breaking(self.search.model, self.plain, self.changed, moves_before(self.s, self.length))


def _suspects(early: Tensor, place: Tensor, bound: Bound) -> list[int]:
    """A few rows with a hit above the bound, in the order of the position hit and then of the token changed.

    The batch's first row is among them: it may be the only one that leaks, into all others.
    """
    rows, positions = (early > bound.size).nonzero(as_tuple=True)
    first = dict.fromkeys(int(row) for _, _, row in sorted(zip(positions, place[rows], rows, strict=True)))
    few = list(first)[:: max(len(first) // SUSPECTS, 1)][:SUSPECTS]
    return few + [row for row in (0,) if row in first and row not in few]


def _separately(tried: Changes, row: int) -> Iterator[tuple[Changes, int]]:
    """One change by itself, then as the only change of the batch it was in; with its row."""
    yield tried.part(slice(row, row + 1)), 0
    size = tried.rows_at_once
    batch, index = tried.part(slice(row - row % size, row - row % size + size)), row % size
    changed = batch.plain.clone()
    changed[index] = batch.changed[index]
    yield replace(batch, changed=changed), index


def moves_before(s: int, T: int) -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors differ at a time before s; time is the axis of length T (every such axis, if several)."""

    def breaks(one: Tensor, other: Tensor) -> bool:
        differ = (one != other) & ~(one.isnan() & other.isnan())
        times = [axis for axis, size in enumerate(one.shape) if size == T]
        return bool(times) and all(bool(differ.narrow(axis, 0, s).any()) for axis in times)

    return breaks
