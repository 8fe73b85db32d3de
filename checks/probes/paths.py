"""The code paths of a model: each way of ways.py with a model brought onto it, and tokens that fit.

A law that holds whatever is called beside it (rows, padding, prefixes, repeats, causality) is tried on every one of
them: check_paths.py. A new way, added here, serves all of these laws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import Bound, NotApplicable
from ..subject import Subject
from ..watch.arithmetic import operations_of, same_arithmetic, same_draws
from ..ways import (
    AFTER_LONGER,
    CACHED,
    CHECKPOINTED,
    LONG_SEQUENCE,
    MANY_ROWS,
    PLAIN_KERNEL,
    STEP,
    WITHOUT_FUSED,
    Way,
    autocast_to_bfloat16,
    computed_in,
    training_with,
    without_fused_attention,
)
from .cached import expect_cache
from .influence import call, length
from .long import LONG, LONGER
from .module_state import renormalized
from .precision import precise, precision, spread
from .recomputation import checkpointing

DROPOUT = 0.2
MANY = 33  # rows: more than a chunk of 32


class NoSuchPath(Exception):
    """The model does not have this path; says why."""


@dataclass(frozen=True)
class Path:
    """A model on one of its code paths, and the size of the batch that is read there."""

    subject: Subject
    way: Way
    model: nn.Module
    rows: int
    length: int
    dtype: torch.dtype | None = None  # in which numbers are rounded, where that is coarser than the finest type

    def tokens(self, *, seed: int = 0) -> Tensor:
        return self.subject.tokens(self.rows, self.length, seed=self.subject.seed + seed)

    @cached_property
    def plain(self) -> Tensor:
        """The logits of its tokens, without padding."""
        return self.run(self.tokens())

    def affordable(self, calls: int) -> int:
        """How many of this number of calls to make: at least one."""
        return self.subject.affordable(self.rows * self.length, calls, sweeps=0.1)

    def run(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        return call(self.subject, self.model, tokens, mask, self.way)

    def bound(self, logits: Tensor) -> Bound:
        """What rounding can explain between calls of other shapes or other routes."""
        if self.dtype is None:
            return precision(self.subject).bound(logits)
        name = str(self.dtype).removeprefix("torch.")
        return Bound(64 * torch.finfo(self.dtype).eps * spread(logits), f"64 roundings in {name}")

    def comparable(self, run: Callable[[], Tensor], again: Callable[[], Tensor]) -> bool:
        """Whether two calls of equal shapes may be compared: with the same noise, rounded in the same order.

        In a coarse type a mixture of experts rounds by how many tokens chose an expert.
        """
        if self.way.training and not same_draws(run, again):
            return False
        return self.dtype is None or same_arithmetic(run, again)

    def __str__(self) -> str:
        return f"{self.way.name}, {self.rows} rows of {self.length} tokens"


def every_path(subject: Subject, missing: dict[str, str]) -> Iterator[Path]:
    """The paths that the model has, its plain one (eval mode, finest type, short) left out.

    `missing` gets why it has not the others. Models are built once for all the laws, unless that is costly.
    """
    if costly(subject):
        yield from _found(subject, missing)
    else:
        found, reasons = subject.once(_all_paths)
        missing.update(reasons)
        yield from found


def costly(subject: Subject) -> bool:
    """Whether a model can be on one path at a time only: it is large, or the only one that there is."""
    return subject.large or not subject.builds_afresh


def _all_paths(subject: Subject, /) -> tuple[list[Path], dict[str, str]]:
    missing: dict[str, str] = {}
    return list(_found(subject, missing)), missing


def _found(subject: Subject, missing: dict[str, str]) -> Iterator[Path]:
    for way, find in ways(subject):
        try:
            path = find(way)
            path.plain  # noqa: B018  # a first call, which may be refused
        except NoSuchPath as reason:
            missing[way.name] = str(reason)
        except NotApplicable as reason:
            missing[way.name] = reason.reason
        except Exception as error:  # a path that the model refuses; crashes are judged by the checks of that path
            missing[way.name] = f"{type(error).__name__}: {str(error)[:100]}"
        else:
            yield path


def ways(subject: Subject) -> list[tuple[Way, Callable[[Way], Path]]]:
    """Every way, and what brings a model onto it."""
    half, full = torch.bfloat16, torch.float32
    return [
        (training_with(DROPOUT), partial(plainly, subject, dropout=DROPOUT)),
        (STEP, partial(plainly, subject)),
        (CHECKPOINTED, partial(recomputed, subject)),
        (PLAIN_KERNEL, partial(by_the_plain_kernel, subject)),
        (WITHOUT_FUSED, partial(without_fused, subject)),
        (CACHED, partial(into_a_cache, subject)),
        (LONG_SEQUENCE, partial(long, subject, LONG, 3)),
        (LONG_SEQUENCE, partial(long, subject, LONGER, 2)),
        (MANY_ROWS, partial(with_many_rows, subject)),
        (AFTER_LONGER, partial(after_a_longer_sequence, subject)),
        (autocast_to_bfloat16(subject.device), partial(in_type, subject, half, full)),
        *((computed_in(dtype), partial(in_type, subject, dtype, dtype)) for dtype in (full, half, torch.float16)),
    ]


def plainly(subject: Subject, way: Way, **sizes: Any) -> Path:
    asked = {name: value for name, value in sizes.items() if subject.can_vary(name)}
    if sizes and not asked:
        raise NoSuchPath("its dropout cannot be set")
    return Path(subject, way, precise(subject, **asked), 3, length(subject))


def recomputed(subject: Subject, way: Way) -> Path:
    path = plainly(subject, way)
    switch = checkpointing(path.model)
    if switch is None:
        raise NoSuchPath("it has no switch for activation checkpointing that is off")
    switch()
    return path


def fused(path: Path) -> bool:
    """Whether attention is PyTorch's fused function."""
    log = operations_of(lambda: call(path.subject, path.model, path.tokens()[:1]))
    return any("scaled_dot_product" in name for name, *_ in log)


def by_the_plain_kernel(subject: Subject, way: Way) -> Path:
    path = plainly(subject, way)
    if not fused(path):
        raise NoSuchPath("attention does not use PyTorch's fused function")
    return path


def without_fused(subject: Subject, way: Way) -> Path:
    if not fused(plainly(subject, way)):
        raise NoSuchPath("attention does not use PyTorch's fused function")
    with without_fused_attention():
        path = plainly(subject, way)
    if fused(path):
        raise NoSuchPath("it has no other attention")
    return path


def into_a_cache(subject: Subject, way: Way) -> Path:
    path = plainly(subject, way)
    try:
        expect_cache(subject, path.model)
    except NotApplicable as error:
        raise NoSuchPath(error.reason) from None
    if getattr(subject.new_cache(path.model, path.rows), "inside_the_model", False):
        raise NoSuchPath("its cache, kept by the model, holds one text")
    return path


def long(subject: Subject, T: int, rows: int, way: Way) -> Path:
    varies = subject.can_vary("block_size")
    T = T if varies else min(T, subject.longest or T)
    if T <= length(subject):
        raise NoSuchPath(f"it reads at most {T} tokens")
    model = precise(subject, block_size=max(T, subject.sizes.block_size)) if varies else precise(subject)
    return Path(subject, way, model, rows if subject.affordable(T, rows) >= rows else 2, T)


def with_many_rows(subject: Subject, way: Way) -> Path:
    if subject.affordable(MANY * 3, 3) < 3:
        raise NoSuchPath(f"{MANY} rows take too long")
    return Path(subject, way, precise(subject), MANY, min(3, length(subject)))


def after_a_longer_sequence(subject: Subject, way: Way) -> Path:
    """Its length is half of what the model has then read."""
    path = plainly(subject, way)
    T = max(path.length // 2, 1)
    longer = min(2 * path.length, subject.longest or 2 * path.length)
    call(subject, path.model, subject.tokens(1, max(longer, path.length), seed=subject.seed + 3))
    return Path(subject, way, path.model, 3, T)


def in_type(subject: Subject, dtype: torch.dtype, weights: torch.dtype, way: Way) -> Path:
    if dtype == precision(subject).dtype:
        raise NoSuchPath("it is the finest type in which the model runs")
    if slow := subject.too_slow_in(dtype):
        raise NoSuchPath(slow)
    model = subject.amplified(seed=subject.seed, dtype=weights)
    if renormalized(model):
        raise NoSuchPath("each forward rescales its embeddings, which rounds them anew")
    return Path(subject, way, model, 3, length(subject), dtype)
