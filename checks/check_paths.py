"""What holds in one short call must hold on every code path: long, cached, recomputed, rounded, under autocast.

probes/paths.py has the table of the paths; each law here is tried on all that the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .expect import (
    CAUSAL,
    EQUAL_SHAPE,
    REPEATS,
    ROWS_APART,
    STEADY,
    expect_same,
    fail,
    farthest,
    needs,
    note,
)
from .probes.experts import expect_room
from .probes.influence import changes, moved, some_of
from .probes.leak_search import LeakSearch
from .probes.leaks import expect_no_leak
from .probes.long import LONG
from .probes.padding import ragged
from .probes.paths import Path, costly, every_path
from .probes.precision import spread
from .probes.preconditions import expect_causal, expect_takes_mask
from .probes.prefixes import expect_prefixes_agree
from .subject import Subject, torch_seeded
from .watch.calls import first_breaking
from .ways import LONG_SEQUENCE, MANY_ROWS, Way

PREFIX = "check_causality.check_prefix_gives_the_same_logits"
CONTENT = "check_masking.check_pad_contents_change_nothing"
CAUSAL_PATHS = (
    f"{CAUSAL}_in_training",
    f"{CAUSAL}_under_a_mask",
    f"{CAUSAL}_in_long_sequences",
    f"{CAUSAL}_by_another_attention",
    f"{CAUSAL}_into_a_cache",
    f"{CAUSAL}_in_low_precision",
)
KEPT = 3  # rows that keep their tokens, one call each, while all others change


@needs(CAUSAL, *CAUSAL_PATHS)
def check_future_cannot_change_past_on_any_path(subject: Subject) -> None:
    """On every code path, changing a token must not change any earlier logit."""
    expect_causal(subject)
    expect_on_every_path(subject, past_stays)


@needs(*STEADY, ROWS_APART)
def check_rows_do_not_touch_on_any_path(subject: Subject) -> None:
    """On every code path, changing the tokens of the other rows must not change a row's logits."""
    expect_on_every_path(subject, rows_stay)


@needs(*STEADY, CONTENT)
def check_padding_is_unread_on_any_path(subject: Subject) -> None:
    """On every code path, token ids in the padding must not change the logits of real tokens."""
    expect_takes_mask(subject)
    expect_on_every_path(subject, padding_is_unread)


@needs(CAUSAL, PREFIX, "check_paths.check_rows_do_not_touch_on_any_path")
def check_prefixes_agree_on_any_path(subject: Subject) -> None:
    """On every code path without noise, the first t tokens must have the same logits read alone as with the rest."""
    expect_causal(subject)
    expect_on_every_path(subject, prefixes_agree)


@needs(REPEATS)
def check_calls_repeat_on_any_path(subject: Subject) -> None:
    """On every code path the same call must give the same logits bit for bit; in eval mode for any random state."""
    expect_on_every_path(subject, calls_repeat)


# -- the laws, of one path each: None once tried, or why not


def past_stays(path: Path) -> str | None:
    if path.length < 2 or path.way == LONG_SEQUENCE:
        return "tried at more places elsewhere"  # CAUSAL_PATHS
    cases = changes(path.subject, path.tokens()[:1], alternatives=1, sweeps=0.1)
    bound = None if path.dtype is None else path.bound(path.plain)
    expect_no_leak(LeakSearch(path.subject, path.model, cases, path.way, bound=bound))
    return None


def rows_stay(path: Path) -> None:
    tokens, others = path.tokens(), path.tokens(seed=7)
    kept = path.affordable(KEPT)
    for row in some_of(list(range(path.rows)), kept, seed=path.subject.seed)[-kept:]:
        changed = others.clone()
        changed[row] = tokens[row]
        judged = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        judged[row] = True
        expect_unmoved(
            path,
            path.plain,
            (tokens, changed),
            judged,
            says="changing the tokens of the other rows changes the logits of row {row}",
            likely=row_mixers(path),
            advice="Look for code that runs on this path only and works along the batch axis (axis 0): a roll, a "
            "reshape, a mean, a buffer that all rows share.",
        )


def row_mixers(path: Path) -> tuple[str, ...]:
    """Known bugs that mix rows on this path."""
    if path.way == LONG_SEQUENCE:
        return ("rows-mix-in-long-sequences",)
    if path.way == MANY_ROWS:
        return ("rows-mix-in-large-batches",)
    return ("rows-mix-under-autocast",) if "autocast" in path.way.name else ()


def padding_is_unread(path: Path) -> str | None:
    for side in ("left", "right")[: path.affordable(2)] if path.length <= LONG else ("left",):
        mask = ragged(path.rows, path.length, side, seed=path.subject.seed).to(path.subject.device)
        tokens, others = path.tokens(), path.tokens(seed=7)
        try:
            before = path.run(tokens, mask)
        except Exception as error:  # a mask is not taken here: with a cache, say, or in bfloat16
            return f"{type(error).__name__}: {str(error)[:100]}"
        expect_unmoved(
            path,
            before,
            (tokens, torch.where(mask, tokens, others)),
            mask,
            mask=mask,
            says=f"changing the ids in the padding on the {side} changes the logits of real tokens, first in row "
            "{row} at position {t}",
            likely=("pad-mask-lost-under-autocast", "pad-mask-ignored"),
            advice="Pass the mask on where this path leaves the usual one: each branch of attention needs it.",
        )
    return None


def prefixes_agree(path: Path) -> str | None:
    T = path.length
    if path.way.training or path.dtype is not None or T < 3:
        return "with noise, in a coarse type, or too short"
    lengths = sorted({max(T // 2, 2), 2, T - 1})
    expect_prefixes_agree(
        path.model,
        path.run,
        path.tokens(),
        lengths if path.affordable(3) == 3 else [max(T // 2, 2)],
        path.bound,
        whole=path.plain,
        where=f" ({path.way.name})",
        likely=("positions-stretched-when-long",),
        advice="Look for anything on this path that depends on the input's length: a scale, a window, a table.",
    )
    return None


def calls_repeat(path: Path) -> None:
    tokens = path.tokens()
    other = path if path.way.training else replace(path, way=reseeded(path.way, path.subject.seed + 1))
    expect_same(
        other.run(tokens),
        path.plain,
        says=f"the same call gives different logits ({path.way.name})",
        where=partial(first_breaking, path.model, partial(path.run, tokens), partial(other.run, tokens), differ),
        likely=("noise-under-autocast",),
        advice="Look for random numbers, or for state that forward writes, on this path only.",
        path=path.way.name,
    )


Law = Callable[[Path], "str | None"]
LAWS: tuple[Law, ...] = (past_stays, rows_stay, padding_is_unread, prefixes_agree, calls_repeat)


def expect_on_every_path(subject: Subject, law: Law) -> None:
    """Tries the law on every path. Of a model that is costly to bring onto one, all laws are tried at once there."""
    found = subject.once(every_law) if costly(subject) else Tried.of(subject, (law,))
    note(paths_it_has_not=found.missing, paths=found.paths[law], refused=found.refused[law])
    if law in found.ends:
        raise found.ends[law]


@dataclass
class Tried:
    """What came of laws on the paths of a subject."""

    missing: dict[str, str]  # paths that it has not
    paths: dict[Law, list[str]]  # on which the law holds
    refused: dict[Law, dict[str, str]]  # and those on which it was not tried
    ends: dict[Law, Exception]  # what stopped it: a finding, for one

    @classmethod
    def of(cls, subject: Subject, laws: Sequence[Law]) -> Tried:
        tried = cls({}, {law: [] for law in laws}, {law: {} for law in laws}, {})
        for path in every_path(subject, tried.missing):
            for law in (law for law in laws if law not in tried.ends):
                try:
                    reason = law(path)
                except Exception as error:
                    tried.ends[law] = error
                    continue
                if reason is None:
                    tried.paths[law].append(str(path))
                else:
                    tried.refused[law][path.way.name] = reason
            if len(tried.ends) == len(laws):
                break
        return tried


def every_law(subject: Subject, /) -> Tried:
    return Tried.of(subject, LAWS)


def expect_unmoved(
    path: Path,
    before: Tensor,
    tokens: tuple[Tensor, Tensor],
    judged: Tensor,
    *,
    says: str,
    mask: Tensor | None = None,
    **finding: Any,
) -> None:
    """Fails if other tokens of equal shape move the logits [B, T, V] where `judged` [B, T] is True.

    In a coarse type any move counts: equal shapes round alike.
    """
    run, again = (partial(path.run, each, mask) for each in tokens)
    moves = torch.where(judged, moved(before, again()), 0.0)
    bound = path.bound(before) if path.dtype is None else EQUAL_SHAPE
    hits = (moves > bound.size).nonzero()
    if not len(hits) or not path.comparable(run, again):
        return
    row, t = (int(i) for i in hits[0])
    size = float(moves.max()) / spread(before)
    where = first_breaking(path.model, run, again, differ_at(judged))
    expect_room(path.subject, path.model, tokens[0], path.way, where)
    fail(
        f"{says.format(row=row, t=t)}, by {size:.3g} standard deviations of the logits, {path}; a short plain call is "
        f"right; allowed {bound}",
        where=where,
        path=path.way.name,
        first={"row": row, "t": t},
        size=size,
        bound=bound.size,
        **finding,
    )


def differ_at(judged: Tensor) -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors [B, …, T, …] differ at a judged place."""
    B, T = judged.shape

    def breaks(one: Tensor, other: Tensor) -> bool:
        if one.shape[0] != B or T not in one.shape[1:] or one.shape != other.shape:
            return False
        time = 1 + one.shape[1:].index(T)
        differ = ((one != other) & ~(one.isnan() & other.isnan())).movedim(time, 1).flatten(2).any(dim=2)
        return bool((differ & judged).any())

    return breaks


def reseeded(way: Way, seed: int) -> Way:
    """The same way, entered with another random state."""

    @contextmanager
    def inside() -> Iterator[None]:
        with way.inside(), torch_seeded(seed):
            yield

    return replace(way, inside=inside)


def differ(one: Tensor, other: Tensor) -> bool:
    return farthest(one, other) > 0
