"""What holds in one short call must hold on every code path: long, cached, recomputed, rounded, under autocast.

probes/paths.py has the table of the paths; each law here is tried on all that the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from .probes.paths import Path, every_path
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
    tried = []
    for path in every_path(subject):
        if path.length < 2 or path.way == LONG_SEQUENCE:  # which CAUSAL_PATHS has tried at more places
            continue
        cases = changes(subject, path.tokens()[:1], alternatives=1, sweeps=0.1)
        bound = None if path.dtype is None else path.bound(path.plain)
        expect_no_leak(LeakSearch(subject, path.model, cases, path.way, bound=bound))
        tried.append(str(path))
    note(paths=tried)


@needs(*STEADY, ROWS_APART)
def check_rows_do_not_touch_on_any_path(subject: Subject) -> None:
    """On every code path, changing the tokens of the other rows must not change a row's logits."""
    tried = []
    for path in every_path(subject):
        tokens, others = path.tokens(), path.tokens(seed=7)
        for row in some_of(list(range(path.rows)), KEPT, seed=subject.seed):
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
        tried.append(str(path))
    note(paths=tried)


def row_mixers(path: Path) -> tuple[str, ...]:
    """Known bugs that mix rows on this path."""
    if path.way == LONG_SEQUENCE:
        return ("rows-mix-in-long-sequences",)
    if path.way == MANY_ROWS:
        return ("rows-mix-in-large-batches",)
    return ("rows-mix-under-autocast",) if "autocast" in path.way.name else ()


@needs(*STEADY, CONTENT)
def check_padding_is_unread_on_any_path(subject: Subject) -> None:
    """On every code path, token ids in the padding must not change the logits of real tokens."""
    expect_takes_mask(subject)
    tried, refused = [], {}
    for path in every_path(subject):
        for side in ("left", "right") if path.length <= LONG else ("left",):
            mask = ragged(path.rows, path.length, side, seed=subject.seed).to(subject.device)
            tokens, others = path.tokens(), path.tokens(seed=7)
            try:
                before = path.run(tokens, mask)
            except Exception as error:  # a mask is not taken here: with a cache, say, or in bfloat16
                refused[path.way.name] = f"{type(error).__name__}: {str(error)[:100]}"
                break
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
        else:
            tried.append(str(path))
    note(paths=tried, refused=refused)


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


@needs(CAUSAL, PREFIX, "check_paths.check_rows_do_not_touch_on_any_path")
def check_prefixes_agree_on_any_path(subject: Subject) -> None:
    """On every code path without noise, the first t tokens must have the same logits read alone as with the rest."""
    expect_causal(subject)
    tried = []
    for path in every_path(subject):
        T = path.length
        if path.way.training or path.dtype is not None or T < 3:
            continue
        expect_prefixes_agree(
            path.model,
            path.run,
            path.tokens(),
            sorted({2, max(T // 2, 2), T - 1}),
            path.bound,
            where=f" ({path.way.name})",
            likely=("positions-stretched-when-long",),
            advice="Look for anything on this path that depends on the input's length: a scale, a window, a table.",
        )
        tried.append(str(path))
    note(paths=tried)


@needs(REPEATS)
def check_calls_repeat_on_any_path(subject: Subject) -> None:
    """On every code path the same call must give the same logits bit for bit; in eval mode for any random state."""
    tried = []
    for path in every_path(subject):
        tokens = path.tokens()
        other = path if path.way.training else replace(path, way=reseeded(path.way, subject.seed + 1))
        expect_same(
            other.run(tokens),
            path.plain,
            says=f"the same call gives different logits ({path.way.name})",
            where=partial(first_breaking, path.model, partial(path.run, tokens), partial(other.run, tokens), differ),
            likely=("noise-under-autocast",),
            advice="Look for random numbers, or for state that forward writes, on this path only.",
            path=path.way.name,
        )
        tried.append(str(path))
    note(paths=tried)


def reseeded(way: Way, seed: int) -> Way:
    """The same way, entered with another random state."""

    @contextmanager
    def inside() -> Iterator[None]:
        with way.inside(), torch_seeded(seed):
            yield

    return replace(way, inside=inside)


def differ(one: Tensor, other: Tensor) -> bool:
    return farthest(one, other) > 0
