"""From a wrong loss to its likely cause: the mistakes that have a closed form of their own, each tried in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from .formula import REDUCTIONS, cross_entropy

Explanation = tuple[str, tuple[str, ...]]  # what it equals, ids of likely bugs
Mistake = tuple[str, tuple[str, ...], Callable[[], Tensor]]  # the same, and its value


def spans(positions: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for position in sorted(positions):
        if runs and position == runs[-1][-1] + 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def misread_mask(asked: set[int], dropped: set[int], places: int) -> Explanation:
    """Why a mask that asks to drop some targets of a row drops others."""
    everything = set(range(places))
    if not dropped:
        return "the mask has no effect on what is trained", ("loss-mask-ignored", "masked-numerator-unmasked")
    if dropped == everything - asked:
        return "the mask is read the wrong way round: what it keeps is dropped", ("loss-mask-inverted",)
    for shift in (1, -1, 2, -2):
        if dropped & inner(shift, places) == {t + shift for t in asked} & inner(shift, places):
            side = "later" if shift > 0 else "earlier"
            steps = f"{abs(shift)} place{'s' if abs(shift) > 1 else ''}"
            return f"the mask is applied {steps} {side} than asked", ("loss-mask-shifted-by-one",)
    if dropped > asked:
        return f"{spans(dropped - asked)} should have been trained", ("last-target-dropped",)
    if dropped < asked:
        return f"{spans(asked - dropped)} should not have been trained", ("padding-counted", "ignore-index-mismatch")
    return "the mask reaches other targets than asked", ("loss-mask-shifted-by-one",)


def inner(shift: int, places: int) -> set[int]:
    """Places whose mask is known after a shift: what moves in from outside is anyone's guess."""
    return set(range(max(shift, 0), places + min(shift, 0)))


def explained(
    got: float, logits: Tensor, targets: Tensor, mask: Tensor, asked: str, *, rounded: bool = False
) -> Explanation:
    """The first known mistake whose value this is; nothing where it has none. `rounded`: the gradient is coarse."""
    want = float((REDUCTIONS[asked](mask) * cross_entropy(logits, targets)).sum())
    off = abs(got / want - 1)
    if off < 1e-9:
        return "", ()
    for says, likely, value in mistakes(logits.double(), targets, mask, asked):
        if math.isclose(got, float(value()), rel_tol=1e-6, abs_tol=1e-9):
            return f"On a ragged batch it is {says}.", likely
    if rounded and off < 1e-2:
        return f"On a ragged batch it is off by {100 * off:.2g} %, as arithmetic in bfloat16 or float16 is.", (
            "loss-in-bf16",
        )
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
        ("the sum of all positions, divided by the unmasked", ("masked-numerator-unmasked",), lambda: losses.sum() / n),
        ("the mean over the masked targets", ("loss-mask-inverted",), lambda: (losses * (1 - m)).sum() / (1 - m).sum()),
        ("the unmasked sum divided by one target less", ("loss-divided-by-one-less",), lambda: total / (n - 1)),
        ("the unmasked sum divided by one target more", (), lambda: total / (n + 1)),
        *(
            (
                f"the {what} with masked logits set to 0, which adds ln V for each",
                ("masked-logits-zeroed",),
                lambda by=by: (total + (1 - m).sum() * math.log(V)) / by,
            )
            for what, by in (
                ("mean over all positions", everywhere.sum()),
                ("sum over all positions, divided by the unmasked,", n),
            )
        ),
        (
            "the mean over positions of each position's mean over rows",
            ("loss-mean-of-sequence-means",),
            lambda: ((losses * m).sum(0) / m.sum(0).clamp(min=1)).mean(),
        ),
        ("the square of the mean", (), lambda: (total / n).square()),
        (
            "the mean of logits [B, T, V] read as [B, V, T]: reshaped where they should be transposed",
            ("logits-labels-reshape-order",),
            lambda: (cross_entropy(x.reshape(len(x), V, -1).transpose(1, 2), targets) * m).sum() / n,
        ),
        *(
            (f"the mean of logits multiplied by {by:g} first", ("loss-of-scaled-logits",), of(by * x))
            for by in (0.1, 0.5, 0.7, 0.8, 2.0, V**-0.5, V**0.5)
        ),
        *(
            (f"the mean under the mask moved {way} by one", ("loss-mask-shifted-by-one",), moved(losses, mask, i))
            for way, i in (("later", 1), ("earlier", -1))
        ),
        ("the mean in bits, not nats", ("loss-in-bits",), lambda: total / n / math.log(2)),
        ("the perplexity, exp of the mean", (), lambda: (total / n).exp()),
        ("the negative of the mean", (), lambda: -total / n),
        ("the mean after a second softmax", ("softmax-twice",), of(x.softmax(-1))),
        ("the mean of a softmax over positions", ("loss-softmax-over-positions",), lambda: over(x, targets, m, 1)),
        ("the mean of a softmax over rows", ("loss-softmax-over-positions",), lambda: over(x, targets, m, 0)),
        (
            "the mean over all positions, the masked ones against the last symbol",
            ("ignore-index-mismatch",),
            lambda: cross_entropy(x, targets.masked_fill(mask == 0, V - 1)).mean(),
        ),
        ("the mean against targets one place earlier", ("label-shift-missing",), of(x, targets.roll(1, 1))),
        ("the mean against targets one place later", ("label-shifted-twice",), of(x, targets.roll(-1, 1))),
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
