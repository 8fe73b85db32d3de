"""From a wrong update to its likely cause: mistakes with a known update, compared one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 1e-4  # relative; clipping divides by a norm to which 1e-6 is added
# Description, ids of likely bugs, update per unit of learning rate.
Cause = tuple[str, tuple[str, ...], Tensor]


def near(got: Tensor, want: Tensor, bound: float = NEAR) -> bool:
    return bool((got - want).norm() <= bound * want.norm() + 1e-12)


def parallel(got: Tensor, want: Tensor) -> float:
    """Cosine of the angle between two updates; 0 if one of them is 0."""
    size = float(got.norm() * want.norm())
    return float(got @ want) / size if size else 0.0


def angle(got: Tensor, want: Tensor) -> str:
    """The angle between two updates, in degrees."""
    degrees = math.degrees(math.acos(max(-1.0, min(1.0, parallel(got, want)))))
    return f"{degrees:.3g}" if degrees > 1e-3 else "0"


def off_in_direction(got: Tensor, want: Tensor) -> str:
    """`, 3.4° off in direction`; empty for the right direction."""
    degrees = angle(got, want)
    return "" if degrees == "0" else f", {degrees}° off in direction"


def clipped(g: Tensor, limit: float | None) -> Tensor:
    return g if limit is None else g * min(1.0, limit / max(float(g.norm()), 1e-30))


@dataclass
class Micro:
    """One micro-batch: the gradient of its loss sum, and its number of targets."""

    gradient: Tensor
    count: int


def accumulation_mistakes(parts: Sequence[Micro], limit: float | None) -> list[Cause]:
    """The updates that result from wrong ways to combine micro-batches."""
    k, N = len(parts), sum(part.count for part in parts)
    total = torch.stack([part.gradient for part in parts]).sum(0)
    means = [part.gradient / max(part.count, 1) for part in parts]
    last, first = parts[-1], parts[0]
    causes: list[Cause] = [
        (
            "the average of the micro-batches' means: targets in short micro-batches count more",
            ("accum-mean-of-means",),
            torch.stack(means).mean(0),
        ),
        (
            "the sum of the micro-batches' means, not divided by their number",
            ("accum-no-division",),
            torch.stack(means).sum(0),
        ),
        (
            f"divided twice: by all {N} targets and by the {k} micro-batches",
            ("accum-double-normalised",),
            total / N / k,
        ),
        ("the sum over all targets, not divided by their number", ("normalisation-missing",), total),
        (
            "divided by the number of targets of the last micro-batch only",
            ("accum-divides-by-last-count",),
            total / last.count,
        ),
    ]
    for name, part, likely in (
        ("the last", last, ("zero-grad-each-microbatch", "accum-only-last-backward")),
        ("the first", first, ("accum-partial-window-dropped",)),
    ):
        causes += [
            (f"the gradient of {name} micro-batch alone", likely, part.gradient / part.count),
            (
                f"the gradient of {name} micro-batch alone, divided by the number of all targets",
                likely,
                part.gradient / N,
            ),
        ]
    if k > 2:
        rest, n = total - last.gradient, N - last.count
        dropped = "the gradient without the last micro-batch"
        causes += [
            (dropped, ("accum-partial-window-dropped",), rest / n),
            (f"{dropped}, divided by the number of all targets", ("accum-partial-window-dropped",), rest / N),
        ]
    causes = [(says, likely, clipped(g, limit)) for says, likely, g in causes]
    if limit is not None:
        causes += clipped_too_early(parts, N, limit)
    return causes


def clipped_too_early(parts: Sequence[Micro], N: int, limit: float) -> list[Cause]:
    sums = means = torch.zeros_like(parts[0].gradient)
    for part in parts:
        sums = clipped(sums + part.gradient, limit)
        means = clipped(means + part.gradient / N, limit)
    total = torch.stack([part.gradient for part in parts]).sum(0)
    each, early = "clipped after every micro-batch instead of once", ("clip-per-microbatch",)
    return [
        (each, early, sums / N),
        (each, early, clipped(sums / N, limit)),
        (each, early, means),
        ("clipped before the division by the number of targets", ("clip-before-unscale",), clipped(total, limit) / N),
        ("not clipped", ("clip-missing",), total / N),
    ]


def clipping_mistakes(g: Tensor, pieces: Sequence[Tensor], limit: float, count: int) -> list[Cause]:
    """The updates that result from wrong ways to clip; `pieces` is the gradient by parameter."""
    norm, largest, sum_of_all = float(g.norm()), float(g.abs().max()), float(g.abs().sum())
    other = ("clip-by-another-norm",)
    one_by_one = torch.cat([clipped(piece, limit) for piece in pieces])
    return [
        ("not clipped", ("clip-missing", "clip-after-step", "clip-before-backward"), g),
        ("scaled up to the limit although it is shorter", ("clip-always-normalises",), g * limit / norm),
        ("clipped for each parameter separately, which changes its direction", ("clip-per-parameter",), one_by_one),
        ("clipped value by value, which changes its direction", ("clip-by-value",), g.clamp(-limit, limit)),
        ("clipped before the division by the number of targets", ("clip-before-unscale",),
         clipped(g * count, limit) / count),
        ("clipped by its largest entry, not by its norm", other, g * min(1, limit / largest)),
        ("clipped by the sum of its entries, not by its norm", other, g * min(1, limit / sum_of_all)),
        ("clipped by the square of its norm", other, g * min(1, limit / norm**2)),
    ]  # fmt: skip


def step_mistakes(got: Tensor, g: Tensor, earlier: Sequence[Tensor], count: int, rows: int) -> list[Cause]:
    """The updates that result from mistakes in a plain SGD step; `earlier` are the gradients of the steps before."""
    causes: list[Cause] = [
        ("zero: no weight changes", ("zero-grad-between-backward-and-step",), torch.zeros_like(g)),
        (f"{count} times as large: the sum over the targets", ("normalisation-missing",), g * count),
        (f"{rows} times as large: the sum over the rows", (), g * rows),
        (f"divided twice by the {count} targets", ("accum-double-normalised",), g / count),
        ("uphill: the sign is wrong", ("step-uphill",), -g),
    ]
    if earlier:
        causes.append(("the gradient of the step before", ("step-with-stale-gradient",), earlier[-1]))
        for rest in (torch.stack(list(earlier)).sum(0), earlier[-1]):
            a, b = shares(got, g, rest)
            if a > 0 and b > 1e-3 * a:  # the rest may have been divided or clipped together with this gradient
                says = f"{a:.3g} × this gradient plus {b:.3g} × what the steps before left in .grad"
                causes.append((says, ("zero-grad-missing",), a * g + b * rest))
    return causes


def shares(got: Tensor, one: Tensor, other: Tensor) -> tuple[float, float]:
    """The factors a and b for which a × one + b × other is nearest to the update."""
    both = torch.stack((one, other), 1)
    a, b = torch.linalg.lstsq(both, got[:, None]).solution.flatten().tolist()
    return a, b


def pairings(logits: Tensor, tokens: Tensor, targets: Tensor) -> list[tuple[str, tuple[str, ...], Tensor, Tensor]]:
    """Wrong ways to pair logits and targets of a batch [B, T]: description, likely bugs, logits, targets."""
    B, T, V = logits.shape
    turned = logits.transpose(0, 1).reshape(B, T, V)
    flat = logits.reshape(1, B * T, V)
    copied = ("label-shift-missing", "dataset-target-off-by-one")
    return [
        ("the gradient for predicting the token just read: the targets are not shifted", copied, logits, tokens),
        ("the gradient for predicting the token just read", copied, logits[:, 1:], targets[:, :-1]),
        ("the gradient for predicting the token after next: the targets are shifted twice", ("label-shifted-twice",),
         logits[:, :-1], targets[:, 1:]),
        ("the gradient without the last target of every row", ("last-target-dropped",), logits[:, :-1],
         targets[:, :-1]),
        ("the gradient for a batch flattened before the shift: the end of a row predicts the start of the next",
         ("flatten-then-shift",), flat[:, :-1], targets.reshape(1, -1)[:, 1:]),
        ("the gradient for a batch flattened before the shift: the end of a row predicts the start of the next",
         ("flatten-then-shift",), flat[:, :-1], tokens.reshape(1, -1)[:, 1:]),
        ("the gradient for logits and targets reshaped in different orders", ("logits-labels-reshape-order",), turned,
         targets),
        ("the gradient with a second softmax", ("softmax-twice",), logits.softmax(-1), targets),
    ]  # fmt: skip


def cause(got: Tensor, causes: Sequence[Cause]) -> tuple[str, tuple[str, ...]]:
    """The description and the likely bugs of the first mistake that gives this update."""
    for says, likely, update in causes:
        if near(got, update) or (not bool(update.any()) and not bool(got.any())):
            return says, likely
    return "", ()


EVEN = 1e-4  # relative, of the weights of rows


def row_weights(got: Tensor, rows: Sequence[Tensor]) -> list[float] | None:
    """The weight of each row's gradient in an update; None if the update contains anything else."""
    basis = torch.stack(list(rows), 1)
    found = torch.linalg.lstsq(basis, got[:, None]).solution
    near_enough = (basis @ found - got[:, None]).norm() <= NEAR * got.norm()
    return found.flatten().tolist() if near_enough and bool(got.any()) else None


def uneven_rows(counts: Sequence[float]) -> tuple[str, tuple[str, ...]]:
    """Why rows that should all have weight 1 do not: dropped, or wrongly combined from micro-batches."""
    B, largest = len(counts), max(map(abs, counts))
    dropped = [i for i, c in enumerate(counts) if abs(c) < EVEN * largest]
    if dropped:
        return f"the gradient without rows {dropped} of {B}, which are never trained", (
            "accum-partial-window-dropped", "accum-only-last-backward",
        )  # fmt: skip
    for size in range(1, B):
        sizes = [min(size, B - start) for start in range(0, B, size)]
        means = [B / n for n in sizes for _ in range(n)]
        k = len(sizes)
        for divided, likely in ((k, "accum-mean-of-means"), (1, "accum-no-division")):
            if all(math.isclose(c, mean / divided, rel_tol=EVEN) for c, mean in zip(counts, means, strict=True)):
                what = "the average" if divided > 1 else "the sum (not divided)"
                return f"{what} of the means of micro-batches of {sizes} rows", (likely,)
    each = ", ".join(f"{c:.3g}" for c in counts)
    return f"the gradient with rows weighted {each}: micro-batches are clipped or divided one by one", (
        "clip-per-microbatch", "accum-divides-by-last-count",
    )  # fmt: skip


def exchanged_rows(got: Tensor, crossed: Sequence[Sequence[Tensor]]) -> str:
    """Which row is trained on the targets of which other row; empty if none is."""
    B = len(crossed)
    found = row_weights(got, [g for row in crossed for g in row])
    if found is None:
        return ""
    largest = torch.tensor(found).view(B, B).abs().argmax(1).tolist()
    swapped = [(r, s) for r, s in enumerate(largest) if r != s]
    return f"the gradient for row {swapped[0][0]} trained on the targets of row {swapped[0][1]}" if swapped else ""


def decays(got: dict[str, Tensor], wanted: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, float] | None:
    """By parameter, the weight decay that is added to a common multiple of the gradient; None if it is not that."""
    factors, found = [], {}
    for name, g in wanted.items():
        if not bool(g.any()):
            continue
        solution = torch.linalg.lstsq(torch.stack((g, weights[name]), 1), got[name][:, None]).solution.flatten()
        if (torch.stack((g, weights[name]), 1) @ solution - got[name]).norm() > 1e-3 * got[name].norm():
            return None
        factors.append(float(solution[0]))
        found[name] = float(solution[1])
    alike = max(factors) - min(factors) < 1e-2 * abs(max(factors))
    return {n: d for n, d in found.items() if abs(d) > 1e-9} if alike and min(factors) > 0 else None
