"""The likely cause of a wrong loss: every known mistake that has a closed form of its own, tried in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .formula import REDUCTIONS, cross_entropy

Explanation = tuple[str, tuple[str, ...]]  # what is wrong, in words; ids of likely bugs
Mistake = tuple[str, tuple[str, ...], Callable[[], Tensor]]  # the same, and the loss that it gives


def spans(positions: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for position in sorted(positions):
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def named(dropped: Iterable[int]) -> str:
    """`target 3`, `targets 0-2`, `no target`."""
    dropped = list(dropped)
    return f"target{'s' * (len(dropped) > 1)} {spans(dropped)}" if dropped else "no target"


def misread_mask(asked: set[int], dropped: set[int], places: int, rows: Sequence[set[int]] = ()) -> Explanation:
    """Why the targets dropped from a row are not those that its mask drops; `rows`: what the mask of each row drops."""
    if dropped in rows:
        return f"that is row {list(rows).index(dropped)}'s mask", ("loss-mask-of-row-0",)
    everything = set(range(places))
    if not dropped:
        return "the mask has no effect", ("loss-mask-ignored", "masked-numerator-unmasked")
    if dropped == everything - asked:
        return "the mask is inverted: the targets that it keeps are dropped", ("loss-mask-inverted",)
    for shift in (1, -1, 2, -2):
        if dropped & inner(shift, places) == {t + shift for t in asked} & inner(shift, places):
            side = "late" if shift > 0 else "early"
            steps = f"{abs(shift)} position{'s' if abs(shift) > 1 else ''}"
            return f"the mask is applied {steps} too {side}", ("loss-mask-shifted-by-one",)
    if dropped > asked:
        return f"{named(dropped - asked)} should be trained", ("last-target-dropped",)
    if dropped < asked:
        return f"{named(asked - dropped)} should not be trained", ("padding-counted", "ignore-index-mismatch")
    return "the mask is applied to other targets", ("loss-mask-shifted-by-one",)


def inner(shift: int, places: int) -> set[int]:
    """Positions whose mask is known after a shift; what moves in from outside is unknown."""
    return set(range(max(shift, 0), places + min(shift, 0)))


def explained(
    got: float, logits: Tensor, targets: Tensor, mask: Tensor, asked: str, *, rounded: bool = False
) -> Explanation:
    """The first known mistake that gives this loss; empty if none does. `rounded`: the gradient is coarse."""
    want = float((REDUCTIONS[asked](mask) * cross_entropy(logits, targets)).sum())
    off = abs(got / want - 1)
    if off < 1e-9:
        return "", ()
    for says, likely, value in mistakes(logits.double(), targets, mask, asked):
        if math.isclose(got, float(value()), rel_tol=1e-6, abs_tol=1e-9):
            return f"on a ragged batch the loss equals {says}", likely
    if rounded and off < 1e-2:
        return f"on a ragged batch the loss is off by {100 * off:.2g} %, as in bfloat16 or float16", ("loss-in-bf16",)
    return "", ()


def mistakes(x: Tensor, targets: Tensor, mask: Tensor, asked: str) -> list[Mistake]:
    losses, m = cross_entropy(x, targets), mask.double()
    n, everywhere = m.sum(), torch.ones_like(m)
    total = (losses * m).sum()
    V = x.shape[-1]

    def of(logits: Tensor, labels: Tensor = targets) -> Callable[[], Tensor]:
        return lambda: (cross_entropy(logits, labels) * m).sum() / n

    named: list[Mistake] = [
        ("the mean over all positions, masked ones included", ("loss-mask-ignored", "padding-counted"), losses.mean),
        (
            "the sum over all positions divided by the number of unmasked ones",
            ("masked-numerator-unmasked",),
            lambda: losses.sum() / n,
        ),
        ("the mean over the masked targets", ("loss-mask-inverted",), lambda: (losses * (1 - m)).sum() / (1 - m).sum()),
        (
            "the sum over the unmasked targets divided by their number minus 1",
            ("loss-divided-by-one-less",),
            lambda: total / (n - 1),
        ),
        ("the sum over the unmasked targets divided by their number plus 1", (), lambda: total / (n + 1)),
        *(
            (
                f"the {what} with masked logits set to 0, which adds ln V for each masked target",
                ("masked-logits-zeroed",),
                lambda by=by: (total + (1 - m).sum() * math.log(V)) / by,
            )
            for what, by in (
                ("mean over all positions", everywhere.sum()),
                ("sum over all positions divided by the number of unmasked ones,", n),
            )
        ),
        (
            "the mean over positions of each position's mean over rows",
            ("loss-mean-of-sequence-means",),
            lambda: ((losses * m).sum(0) / m.sum(0).clamp(min=1)).mean(),
        ),
        ("the square of the mean", (), lambda: (total / n).square()),
        (
            "the mean with logits [B, T, V] read as [B, V, T]: reshaped instead of transposed",
            ("logits-labels-reshape-order",),
            lambda: (cross_entropy(x.reshape(len(x), V, -1).transpose(1, 2), targets) * m).sum() / n,
        ),
        *(
            (f"the mean for logits multiplied by {by:g}", ("loss-of-scaled-logits",), of(by * x))
            for by in (0.1, 0.5, 0.7, 0.8, 2.0, V**-0.5, V**0.5)
        ),
        *(
            (f"the mean under the mask shifted {way} by 1", ("loss-mask-shifted-by-one",), moved(losses, mask, i))
            for way, i in (("later", 1), ("earlier", -1))
        ),
        ("the mean in bits instead of nats", ("loss-in-bits",), lambda: total / n / math.log(2)),
        ("the perplexity, the exponential of the mean", (), lambda: (total / n).exp()),
        ("the negative of the mean", (), lambda: -total / n),
        ("the mean after a second softmax", ("softmax-twice",), of(x.softmax(-1))),
        ("the mean with a softmax over positions", ("loss-softmax-over-positions",), lambda: over(x, targets, m, 1)),
        ("the mean with a softmax over rows", ("loss-softmax-over-positions",), lambda: over(x, targets, m, 0)),
        (
            "the mean over all positions, with the last token id as target where masked",
            ("ignore-index-mismatch",),
            lambda: cross_entropy(x, targets.masked_fill(mask == 0, V - 1)).mean(),
        ),
        ("the mean against targets one position earlier", ("label-shift-missing",), of(x, targets.roll(1, 1))),
        ("the mean against targets one position later", ("label-shifted-twice",), of(x, targets.roll(-1, 1))),
    ]
    return [*other_reductions(losses, mask, asked), *named, *bounded(x, targets, m)]


def other_reductions(losses: Tensor, mask: Tensor, asked: str) -> list[Mistake]:
    likely = {
        "the mean over rows of each row's mean": ("loss-mean-of-sequence-means",),
        "the sum over the unmasked, divided by all positions": ("masked-mean-over-all-positions",),
    }

    def value(name: str) -> Callable[[], Tensor]:
        return lambda: (REDUCTIONS[name](mask) * losses).sum()

    return [
        (f"the {name.removeprefix('the ')}", likely.get(name, ()), value(name)) for name in REDUCTIONS if name != asked
    ]


def moved(losses: Tensor, mask: Tensor, by: int) -> Callable[[], Tensor]:
    edge = mask[:, :1] if by > 0 else mask[:, -1:]
    m = torch.cat((edge, mask[:, :-1]) if by > 0 else (mask[:, 1:], edge), 1).double()
    return lambda: (losses * m).sum() / m.sum()


def bounded(x: Tensor, targets: Tensor, m: Tensor) -> list[Mistake]:
    p = x.softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    def value(i: int) -> Callable[[], Tensor]:
        return lambda: -((p + 10.0**-i).log() * m).sum() / m.sum()

    return [(f"the mean of -log(p + 1e-{i})", ("log-plus-eps",), value(i)) for i in range(1, 11)]


def over(x: Tensor, targets: Tensor, m: Tensor, axis: int) -> Tensor:
    picked = (x.log_softmax(axis) * F.one_hot(targets, x.shape[-1])).sum(-1)
    return -(picked * m).sum() / m.sum()
