"""What checks of a loss share: the cases they put it to, and when a formula is known for it at all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..expect import Bound, NotApplicable, advise, fail
from ..subject import Subject
from .explained import explained, spans
from .formula import REDUCTIONS, USUAL, cross_entropy
from .met_loss import MetLoss, met_loss
from .reading import EXACT, gradient, read

FLOAT64 = Bound(1e-9, "float64, relative to the largest")
FLOAT32 = Bound(2e-6, "the loss computes in float32; relative to the largest")


def readable(subject: Subject, *, mask: bool = False) -> MetLoss:
    """The loss, if its places can be told; with `mask`, only one that can be told what to leave out."""
    loss = met_loss(subject)
    if loss.reading is None:
        raise NotApplicable("the gradient is not that of a cross entropy, so no place can be told", called=loss.says)
    if mask and not loss.masks:
        raise NotApplicable("the loss takes no mask, and labels of -100 and -1 are not left out", called=loss.says)
    return loss


def closed_form(subject: Subject) -> None:
    """Raises NotApplicable where no closed form is known; says what legitimate addition stands in its way."""
    loss = met_loss(subject)
    declared = subject.declared("reduction")
    if declared is not None and declared not in REDUCTIONS:
        raise NotApplicable(f"the loss is declared to be {declared!r}, for which no formula is known here")
    if loss.changes_logits or (loss.inside_model and loss.reading is None):
        raise NotApplicable("the model changes its logits after its head, so the loss of given logits is not to be had")
    expected = subject.declared("smoothing")
    if loss.smoothing and expected is not None and abs(loss.smoothing - expected) > 1e-2:
        fail(
            f"the loss smooths its targets: {loss.smoothing:.3g} of the probability goes to other symbols, "
            f"declared {expected:g}",
            likely=("labels-smoothed",),
            advice="label_smoothing= of F.cross_entropy is what the declaration says, and 0 in an evaluation.",
        )
    if subject.declared("called") is None:
        undeclared(loss)
        usual(subject, loss)


def undeclared(loss: MetLoss) -> None:
    if loss.smoothing > 0.5:
        fail(
            f"the loss smooths its targets: {loss.smoothing:.3g} of the probability goes to other symbols, and "
            f"{1 - loss.smoothing:.3g} to the target: as when the confidence is given where the smoothing is asked",
            likely=("labels-smoothed",),
            advice="label_smoothing=0.1 leaves 0.9 to the target.",
        )
    if loss.smoothing:
        advise(f"the loss smooths its targets: {loss.smoothing:.3g} of the probability goes to other symbols")
    if loss.smoothing and loss.reading is not None and not loss.reading.even:
        raise NotApplicable("the loss smooths its targets in a way for which no formula is known here")
    if loss.weighs_symbols:
        advise("the loss weighs targets by their token id (class weights)")
        raise NotApplicable("targets weigh by their token id")
    extra = addition(loss)
    if extra:
        advise(f"the loss adds {extra} to the cross entropy")
        raise NotApplicable(f"the loss is the cross entropy and {extra}")


def usual(subject: Subject, loss: MetLoss) -> None:
    """Raises NotApplicable for a loss that is no cross entropy and no known mistake in one: it may be meant."""
    if loss.reading is not None and loss.reading.error < EXACT:
        return
    if not cause(subject, loss)[0]:
        advise("the loss is no cross entropy (a focal loss, say): whether that is meant cannot be told from outside")
        raise NotApplicable("the loss is no cross entropy, and no mistake in one that is known here", called=loss.says)


def addition(loss: MetLoss) -> str:
    """What the loss is more than its cross entropy, if it is one of the usual additions."""
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask = all_kept(loss, masks(loss.places)[1])
    for name in (loss.reduction,) if loss.reduction in USUAL else USUAL[:2]:
        weights, everywhere = (REDUCTIONS[name](m) for m in (mask, torch.ones_like(mask)))
        extras, squares = [], []
        for x in (logits, 2 * logits.flip(-1), 0.5 * logits + 1):
            want = (weights * cross_entropy(x, targets, loss.smoothing)).sum()
            extras.append(float(loss(x, targets, given(loss, mask)).detach() - want))
            squares.append([float((w * x.logsumexp(-1).square()).sum()) for w in (weights, everywhere)])
        size = max(map(abs, extras))
        if size > 1e-6 and constant_of_masked(loss, logits, targets, name, extras[0]):
            return ""
        if size > 1e-6 and max(extras) - min(extras) < 1e-5 * size:
            return f"{extras[0]:.3g}, whatever the logits are (an auxiliary loss)"
        for column in (0, 1):
            factors = [extra / square[column] for extra, square in zip(extras, squares, strict=True)]
            if size > 1e-6 and max(factors) - min(factors) < 1e-3 * abs(factors[0]):
                return f"{factors[0]:.3g} × (log Σ exp)² (a z-loss)"
    return ""


def constant_of_masked(loss: MetLoss, logits: Tensor, targets: Tensor, name: str, extra: float) -> bool:
    """Whether what is added goes with the places masked, as ln V of logits set to 0 does: then it is a mistake."""
    whole = all_kept(loss, torch.ones_like(targets, dtype=torch.bool))
    want = (REDUCTIONS[name](whole) * cross_entropy(logits, targets, loss.smoothing)).sum()
    return bool(loss.masks) and abs(float(loss(logits, targets, given(loss, whole)).detach() - want)) < 1e-3 * abs(
        extra
    )


def cause(subject: Subject, loss: MetLoss) -> tuple[str, tuple[str, ...]]:
    """What the loss of a ragged batch equals instead, and the bugs that would make it so; else how it weighs it."""
    logits, targets = sample(loss, rows=2, places=loss.places, seed=1)
    mask = all_kept(loss, masks(loss.places)[1])
    got = float(loss(logits, targets, given(loss, mask)).detach())
    rounded = loss.reading is not None and loss.reading.error > EXACT and not smooth(loss, logits, targets)
    says, likely = explained(got, logits, targets, mask, reduction(subject, loss), rounded=rounded)
    return (says, likely) if says else (weighed(subject, loss, mask), ())


def smooth(loss: MetLoss, logits: Tensor, targets: Tensor) -> bool:
    """Whether a small change of the logits changes the loss as its gradient says: in 16 bits it moves in leaps."""
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = float((gradient(loss, logits, targets, None) * direction).sum())
    up, down = (float(loss(logits + h * direction, targets, None).detach()) for h in (1e-4, -1e-4))
    return abs((up - down) / 2e-4 - slope) < 0.05 * abs(slope) + 1e-6


def weighed(subject: Subject, loss: MetLoss, mask: Tensor) -> str:
    """How much targets count in a loss that is a cross entropy at each place, against what they should."""
    if loss.reading is None or loss.reading.error > EXACT:
        return ""
    found = read(loss, loss.symbols, loss.V, places=loss.places, mask=given(loss, mask)).weight
    right = weights_of(subject, loss, mask)
    rows = [(found[row][kept] / right[row][kept]).tolist() for row, kept in enumerate(mask)]
    if all(max(row) < (1 + EXACT) * min(row) for row in rows):
        each = " and ".join(f"of row {row} ({len(all_)} of them) × {all_[0]:.4g}" for row, all_ in enumerate(rows))
        return f"On a ragged batch targets count otherwise than they should: {each}."
    uneven = next(row for row, all_ in enumerate(rows) if max(all_) > (1 + EXACT) * min(all_))
    each = ", ".join(f"{value:.3g}" for value in rows[uneven])
    return f"The targets of row {uneven} count, against what they should, {each} times."


def named(dropped: Iterable[int]) -> str:
    dropped = list(dropped)
    return f"target{'s' * (len(dropped) > 1)} {spans(dropped)}" if dropped else "no target"


def reduction(subject: Subject, loss: MetLoss) -> str:
    """The declared reduction, else the one that was found, else the mean."""
    declared = subject.declared("reduction")
    if declared is None and loss.reduction in USUAL:
        return loss.reduction
    return declared if declared in REDUCTIONS else USUAL[0]


def weights_of(subject: Subject, loss: MetLoss, mask: Tensor) -> Tensor:
    return REDUCTIONS[reduction(subject, loss)](all_kept(loss, mask))


def precision(loss: MetLoss) -> Bound:
    return FLOAT64 if loss.reading is None or loss.reading.error < 1e-11 or loss.reading.error > EXACT else FLOAT32


def sample(loss: MetLoss, *, rows: int, places: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, places, loss.V, generator=generator, dtype=torch.float64)
    return logits, loss.symbols[torch.randint(len(loss.symbols), (rows, places), generator=generator)]


def problem(loss: MetLoss, case: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, places, seed = case
    mask = torch.tensor(rows)[:, :places]
    needy = mask[:1] if loss.reduction in USUAL[:2] else mask  # the mean of a row needs something to be a mean of
    needy[~needy[:, len(loss.dropped) :].any(1), -1] = True
    return *sample(loss, rows=len(mask), places=places, seed=seed), mask


def given(loss: MetLoss, mask: Tensor) -> Tensor | None:
    return mask if loss.masks else None


def all_kept(loss: MetLoss, mask: Tensor) -> Tensor:
    """What the loss is asked to keep: everything, if it takes no mask, but for what it drops by itself."""
    kept = mask.clone() if loss.masks else torch.ones_like(mask)
    kept[:, list(loss.dropped)] = False
    return kept


def masks(T: int) -> list[Tensor]:
    """[2, T]: a prompt, padding at the end, padding at the start, holes; the second row always ends later."""
    positions = torch.arange(T)
    prompt = torch.stack((positions >= 3, positions >= 1))
    right = torch.stack((positions < T - 3, positions < T - 1))
    left = torch.stack((positions >= 2, positions >= 0))
    holes = torch.stack((positions % 3 != 1, positions % 4 != 2))
    return [prompt, right, left, holes]


def draw_case(subject: Subject) -> st.SearchStrategy:
    """Rows of a mask, ragged in any way, with at least one target kept in the first."""
    loss = met_loss(subject)
    places, least = loss.places, max(loss.dropped, default=-1) + 2
    row = st.lists(st.booleans(), min_size=places, max_size=places)
    return st.tuples(
        st.lists(row, min_size=1, max_size=3).filter(lambda rows: any(rows[0])),
        st.integers(least, places),
        st.integers(0, 999),
    )
