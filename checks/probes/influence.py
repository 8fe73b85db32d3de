"""Which token reaches which logit: tokens are changed one at a time and the logits before and after compared.

Rows are stacked for speed; a hit is confirmed by separate calls of equal shape that differ in a single token, so that
neither another row nor the arithmetic of another shape can be mistaken for the future.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..expect import EQUAL_SHAPE, Bound, NotApplicable
from ..subject import Subject
from ..watch.calls import Where, first_breaking
from ..watch.draws import seeded
from .module_state import buffers_kept
from .precision import precision

LONGEST = 16  # tokens; sequences in which every pair of positions is tried are not longer
STACKED = 8192  # tokens in one call, at most
SLOW_SHAPE = 0.1  # seconds; some implementations recompile for every new shape
SUSPECTS = 4  # hits to confirm one by one
# Operations after which equal shapes need not mean equal rounding: tokens are sent by value, or scaled by a maximum.
DRAWS = ("dropout", "bernoulli", "rand", "normal", "uniform", "exponential", "multinomial")
ROUTING = {"topk", "sort", "argsort", "nonzero", "argmax", "max", "amax", "aminmax", "multinomial", "bincount"}


@dataclass(frozen=True)
class Way:
    """One way of calling a model: a code path on which a leak may hide. `name` is how it reads in a sentence."""

    name: str
    training: bool = False
    cached: bool = False  # into an empty key-value cache
    inside: Callable[[], AbstractContextManager] = nullcontext
    more: dict[str, Any] = field(default_factory=dict)  # other arguments of the call


EVAL = Way("in eval mode")
TRAIN = Way("in train mode", training=True)


def call(subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None = None, way: Way = EVAL) -> Tensor:
    """Logits [B, T, V] without a graph; dropout, where the way has it, always from the same seed."""
    kept = buffers_kept(model) if way.training else nullcontext()
    with seeded(subject.seed), torch.no_grad(), way.inside(), kept:
        model.train(way.training)
        try:
            cache = subject.new_cache(model, len(tokens)) if way.cached else None
            return subject.logits(model, tokens, mask, cache, **way.more)
        finally:
            model.eval()


def length(subject: Subject) -> int:
    """The longest sequence in which every pair is tried."""
    return min(subject.sizes.block_size, LONGEST)


def lengths(subject: Subject, model: nn.Module) -> list[int]:
    """Every length from 1 on; a few of them where each new shape is slow."""
    T = length(subject)
    call(subject, model, subject.tokens(1, T))
    start = time.perf_counter()
    call(subject, model, subject.tokens(1, max(T - 1, 1)))
    slow = time.perf_counter() - start > SLOW_SHAPE
    shortest = 1 if reads_one_token(subject, model) else 2
    few = sorted({t for t in (1, 2, 3, T // 2, T - 1, T) if shortest <= t <= T})
    return few if slow else list(range(shortest, T + 1))


def reads_one_token(subject: Subject, model: nn.Module) -> bool:
    """Some models refuse a sequence of one token, and say so."""
    try:
        call(subject, model, subject.tokens(1, 1))
    except Exception:
        return False
    return True


def needs_one_token(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable where nothing can be decoded from the begin token alone."""
    if not reads_one_token(subject, model):
        raise NotApplicable("decoding begins with one token, and the model does not read one alone")


def every_id(subject: Subject, T: int, *, rows: int | None = None, seed: int = 0) -> Tensor:
    """[V, T] tokens in which every column holds every id once (a random choice of `rows` of them)."""
    V = subject.sizes.vocab_size
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randperm(V, generator=generator)[: rows or V] for _ in range(T)]
    return torch.stack(columns, dim=1).to(subject.device)


@dataclass
class Changes:
    """Pairs of rows [N, T] that differ in one token each: row n in that at `place[n]`."""

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
        """[N, T], True at the logits that must not move: real tokens before the changed one."""
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
    """Every row of tokens [R, T] with one real token replaced, at each of the places, by so many other ids."""
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


def moved(one: Tensor, other: Tensor) -> Tensor:
    """[N, T]: how far each position's logits [N, T, V] moved, at most; infinite where only one side is NaN."""
    apart = (one - other).abs().double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=torch.inf)).amax(dim=-1)


def measure(subject: Subject, model: nn.Module, tried: Changes, way: Way, *, alone: bool = False) -> Tensor:
    """[N, T]: how far a changed token moved the logits at each position; each row by itself or stacked."""
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
    """[T, T], row t, column s: how far the logits at t moved, at most, when token s was changed."""
    T = moves.shape[1]
    columns = [moves[place == s].amax(dim=0) if bool((place == s).any()) else moves.new_zeros(T) for s in range(T)]
    return torch.stack(columns, dim=1)


@dataclass
class Leak:
    """A changed token s that moved the logits at an earlier position t, by calls that differ in nothing else."""

    t: int
    s: int
    size: float  # how far, in logits
    bound: Bound
    way: Way
    tried: Changes  # one row, or the batch in which only row `row` was changed
    row: int
    pairs: Tensor = field(repr=False, default_factory=lambda: torch.zeros(0, 0))  # [T, T]: every hit, in logits
    search: Changes | None = field(repr=False, default=None)  # all that was tried beside

    @property
    def length(self) -> int:
        return self.tried.plain.shape[1]

    def site(self, subject: Subject, model: nn.Module) -> Where | None:
        """The first module whose output at an earlier position depends on token s while its input does not."""
        tried = self.tried
        return first_breaking(
            model,
            lambda: call(subject, model, tried.plain, tried.mask, self.way),
            lambda: call(subject, model, tried.changed, tried.mask, self.way),
            moves_before(self.s, self.length),
        )


def find_leak(
    subject: Subject,
    model: nn.Module,
    tried: Changes,
    way: Way = EVAL,
    *,
    bound: Bound | None = None,
    exact: bool = True,
    alone: bool = False,
) -> tuple[Leak | None, Tensor]:
    """The first confirmed leak if there is one, and how far every change moved every position [N, T].

    What moves by more than the bound is a leak (default: what the subject's precision cannot explain); what moves by
    less is one, where `exact`, if both calls did the same arithmetic and repeat to the bit.
    """
    moves = measure(subject, model, tried, way, alone=alone)
    early = torch.where(tried.judged(), moves, 0.0)
    if not bool(early.any()):
        return None, moves
    few = tried.part(slice(0, 8))
    loose = bound or precision(subject).bound(call(subject, model, few.plain, few.mask, way), single=2e-5)
    bounds = [loose, EQUAL_SHAPE] if exact else [loose]
    found = (
        _confirm(subject, model, candidate, row, way, limit)
        for limit in bounds
        for suspect in _suspects(early, tried.place, limit)
        for candidate, row in _separately(tried, suspect)
    )
    leak = next((leak for leak in found if leak is not None), None)
    if leak is not None:
        leak.pairs, leak.search = influence(early, tried.place), tried
    return leak, moves


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
    size = max(STACKED // tried.plain.shape[1], 1)
    batch, index = tried.part(slice(row - row % size, row - row % size + size)), row % size
    changed = batch.plain.clone()
    changed[index] = batch.changed[index]
    yield Changes(batch.plain, changed, batch.place, batch.mask), index


def _confirm(subject: Subject, model: nn.Module, tried: Changes, row: int, way: Way, bound: Bound) -> Leak | None:
    """The leak, if it shows again in two separate calls, and for the bound of 0 again in two more."""

    def run(tokens: Tensor) -> Tensor:
        return call(subject, model, tokens, tried.mask, way)

    one, other = run(tried.plain), run(tried.changed)
    early = torch.where(tried.judged()[row], moved(one, other)[row], 0.0)
    hits = (early > bound.size).nonzero()
    if not len(hits):
        return None
    if bound.size == 0:
        repeats = torch.equal(one, run(tried.plain)) and torch.equal(other, run(tried.changed))
        if not repeats or not same_arithmetic(lambda: run(tried.plain), lambda: run(tried.changed)):
            return None
    if way.training and not same_draws(lambda: run(tried.plain), lambda: run(tried.changed)):
        return None
    t = int(hits[0])
    return Leak(t, int(tried.place[row]), float(early[t]), bound, way, tried, row)


def moves_before(s: int, T: int) -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors differ at a time before s; time is the axis of length T (all of them, where several are)."""

    def breaks(one: Tensor, other: Tensor) -> bool:
        differ = (one != other) & ~(one.isnan() & other.isnan())
        times = [axis for axis, size in enumerate(one.shape) if size == T]
        return bool(times) and all(bool(differ.narrow(axis, 0, s).any()) for axis in times)

    return breaks


def same_arithmetic(run: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether two calls ran the same operations on the same shapes, none of which routes by value.

    A mixture of experts multiplies as many tokens as chose an expert: another token's choice changes the rounding.
    """
    one, other = Operations(), Operations()
    with one:
        run()
    with other:
        again()
    names = {name.split(".")[1] for name, *_ in one.log}
    return one.log == other.log and not names & ROUTING and not any("fft" in name for name in names)


def same_draws(run: Callable[[], Any], again: Callable[[], Any]) -> bool:
    """Whether two calls drew random numbers of the same shapes in the same order: from one seed, the same noise.

    In a mixture of experts each drops of as many tokens as chose it: another token's choice is another noise for all.
    """
    logs = []
    for one in (run, again):
        with Operations() as operations:
            one()
        logs.append([entry for entry in operations.log if any(word in entry[0] for word in DRAWS)])
    return logs[0] == logs[1]


class Operations(TorchDispatchMode):
    """Records the operations that run and the shapes of the tensors they take."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append((str(func), *(tuple(arg.shape) for arg in args if isinstance(arg, Tensor))))
        return func(*args, **(kwargs or {}))
