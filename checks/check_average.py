"""Averages of the weights (EMA): that they are copies, how far an update moves them, that they are put back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .expect import READABLE, NotApplicable, fail, needs, note
from .probes.filled import judged
from .subject import Companion, Subject
from .training.met_average import MetAverage, move

COPY = "check_average.check_an_average_is_a_copy"
DECAY = 0.9  # so that its share, 0.1, is told from it
UPDATES, PATIENCE = 6, 100
CLOSE = 1e-3  # of the way to the live weights: far above rounding in float32
Weights = dict[str, Tensor]


def judge_each(subject: Subject, judge: Callable[[MetAverage], Any]) -> dict[str, Any]:
    def made(one: Companion) -> Any:
        with warnings.catch_warnings(), subject.running():
            warnings.simplefilter("ignore")
            return judge(MetAverage(one, subject.build(), DECAY))

    return judged(subject, "average", judge=made)


def live(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def differing(a: Weights, b: Weights) -> list[str]:
    return [name for name in a if not torch.equal(a[name].to(b[name]), b[name])]


def farthest(a: Weights, b: Weights) -> float:
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@needs(*READABLE)
def check_an_average_is_a_copy(subject: Subject) -> None:
    """An average must be a copy: a step of the weights must not change it, and its update must not change them."""
    note(judged=judge_each(subject, expect_copy))


def expect_copy(met: MetAverage) -> int:
    one = met.companion
    for seed in (1, 2):
        before = met.read()
        move(met.model, seed)
        moved = differing(before, met.read())
        if moved:
            when = "was made" if seed == 1 else "was first updated"
            fail(
                f"after {one.name} {when}, {len(moved)} of {len(before)} of its tensors change with the model's weights"
                f", first {moved[0]}: they are the weights themselves, so that there is no average",
                where=one.where,
                likely=("average-is-the-weights",),
                advice="Clone: {name: p.detach().clone() for name, p in model.named_parameters()}.",
                parameters=moved,
            )
        weights = live(met.model)
        met.update()
        written = differing(weights, live(met.model))
        if written:
            fail(
                f"an update of {one.name} changes the model's own weights ({len(written)} of {len(weights)}, first "
                f"{written[0]})",
                where=one.where,
                likely=("average-writes-the-weights",),
                advice="Write to the average: shadow.mul_(decay).add_(p.detach(), alpha=1 - decay).",
                parameters=written,
            )
    return len(before)


@needs(*READABLE, COPY)
def check_an_average_moves_by_its_decay(subject: Subject) -> None:
    """An update must move an average by 1 - decay of the way to the weights, and not at all where it is there."""
    note(judged=judge_each(subject, expect_moves))


def expect_moves(met: MetAverage) -> dict[str, float]:
    one, start = met.companion, met.read()
    met.update()
    off = farthest(start, met.read())
    if off > CLOSE:
        grown = scale_of(start, met.read())
        fail(
            f"{one.name} of weights that have not changed differs from them after an update, by up to {off:.3g}"
            + (f": it is {grown:.4g} times them, so that the shares do not add up to 1" if grown is not None else ""),
            where=one.where,
            likely=("average-adds-without-its-share",),
            advice="decay * average + (1 - decay) * weights, of the same parameter.",
            off=off,
        )
    decays = []
    for seed in range(UPDATES):
        move(met.model, seed)
        decays.append(decay_of(met))
    if all(decay > 1 - 1e-6 for decay in decays):
        for _ in range(PATIENCE):
            met.update()
        if met.waits or differing(start, met.read()):
            raise NotApplicable(f"in {UPDATES + 1} updates it does not move: it waits for more")
        fail(
            f"{one.name} does not move in {UPDATES} updates: it stays what it was when it was made",
            where=one.where,
            likely=("average-never-moves",),
            advice="Update in place (mul_, add_, lerp_), or assign the result back to where the average is kept.",
        )
    expect_decay(met, decays)
    return {"first": decays[0], "last": decays[-1]}


def scale_of(before: Weights, after: Weights) -> float | None:
    """By which number each tensor is multiplied; None where it is more than that."""
    name = max(before, key=lambda n: before[n].numel())
    old, new = before[name].double().flatten(), after[name].double().flatten()
    scale = float(old @ new / (old @ old))
    return scale if float((new - scale * old).norm()) < CLOSE * float(new.norm()) else None


def decay_of(met: MetAverage) -> float:
    """How much of the average an update keeps; fails where it does not move towards the weights."""
    one, before, weights = met.companion, met.read(), live(met.model)
    met.update()
    after = met.read()
    shares = {}
    for name, old in before.items():
        way, went = weights[name].double() - old.double(), after[name].double() - old.double()
        shares[name] = float((went * way).sum() / (way * way).sum())
        aside = float((went - shares[name] * way).norm() / way.norm())
        if aside > CLOSE or not -CLOSE < shares[name] < 1 + CLOSE:
            fail(
                f"an update of {one.name} does not move {name} towards the weights: it goes {shares[name]:.3g} of the "
                f"way, and {aside:.3g} of it aside",
                where=one.where,
                likely=("average-adds-without-its-share",),
                advice="decay * average + (1 - decay) * weights, of the same parameter.",
            )
    low, high = min(shares, key=lambda n: shares[n]), max(shares, key=lambda n: shares[n])
    if shares[high] - shares[low] > CLOSE:
        if shares[low] > CLOSE:
            raise NotApplicable("its parameters have decays of their own")
        still = [name for name, share in shares.items() if share <= CLOSE]
        fail(
            f"an update of {one.name} moves {len(shares) - len(still)} of {len(shares)} parameters, and leaves {low}",
            where=one.where,
            likely=("average-misses-parameters",),
            advice="Update the average of every parameter.",
            parameters=still,
        )
    return 1 - shares[low]


def expect_decay(met: MetAverage, decays: list[float]) -> None:
    """The declared decay; or less than it and rising, as in a warm-up: min(decay, (1 + n) / (10 + n)), say."""
    one, last = met.companion, decays[-1]
    if met.takes is None or math.isclose(last, DECAY, abs_tol=CLOSE):
        return
    swapped = math.isclose(last, 1 - DECAY, abs_tol=CLOSE)
    if swapped and met.takes == "share":  # of the weights: their share is what is declared
        return
    steady = max(decays) - min(decays) < 1e-5
    if last < DECAY and not steady:
        return
    fail(
        f"each update of {one.name} keeps {last:.4g} of the average, should be {DECAY:g} (the decay that it was given)"
        + (": decay and 1 - decay have changed places" if swapped else ""),
        where=one.where,
        likely=("average-swaps-its-decay",),
        advice="decay * average + (1 - decay) * weights; lerp_ takes 1 - decay.",
        got=last,
        want=DECAY,
    )


@needs(*READABLE, COPY)
def check_averaged_weights_are_put_back(subject: Subject) -> None:
    """Applying an average must give the model its weights, and restoring must give back what it had, bit for bit."""
    note(judged=judge_each(subject, expect_put_back))


def expect_put_back(met: MetAverage) -> str:
    one = met.companion
    for seed in (1, 2):
        move(met.model, seed)
        met.update()
    move(met.model, 3)
    weights, average, inside = live(met.model), met.read(), {}
    with met.applied() as restores:
        inside = live(met.model)
    left = differing(inside, average)
    if not differing(inside, weights):
        raise NotApplicable("applying it did not change the model")
    if left:
        fail(
            f"applying {one.name} gives the model {len(average) - len(left)} of {len(average)} averaged tensors; "
            f"{left[0]} is off by up to {farthest({left[0]: inside[left[0]]}, {left[0]: average[left[0]]}):.3g}",
            where=one.where,
            likely=("average-applied-in-part",),
            advice="Copy every averaged tensor into the parameter of its name.",
            parameters=left,
        )
    if not restores:
        return "applies"
    lost = differing(weights, live(met.model))
    if lost:
        now = live(met.model)
        still = len([name for name in lost if torch.equal(now[name], inside[name])])
        fail(
            f"restoring after {one.name} was applied does not give the model its weights back: {len(lost)} of "
            f"{len(weights)} tensors differ" + (f", {still} of them are still the averaged ones" if still else ""),
            where=one.where,
            likely=("average-backup-is-no-copy",),
            advice="Clone the weights before they are overwritten (state_dict() holds the weights themselves), and "
            "copy them back in restore.",
            parameters=lost,
        )
    spoiled = differing(average, met.read())
    if spoiled:
        fail(
            f"applying {one.name} and restoring changes the average itself ({len(spoiled)} of {len(average)} tensors)",
            where=one.where,
            likely=("average-lost-in-restoring",),
            advice="Copy into the parameters with p.data.copy_(average) instead of handing them the average's tensors.",
            parameters=spoiled,
        )
    return "applies and restores"
