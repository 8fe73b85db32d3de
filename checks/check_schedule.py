"""Schedules of the learning rate: their bounds, how a warm-up ends, that they do not rise again, where they end.

Cosine, linear, constant, Noam's and warm-up–stable–decay are all right; what is asked is what their names declare.
"""

from __future__ import annotations

import math
from itertools import pairwise

from .expect import NotApplicable, advise, fail, needs, note
from .probes.filled import judged
from .subject import Subject
from .training.met_schedule import MetSchedule, met_schedule

BOUNDS = "check_schedule.check_a_schedule_keeps_its_bounds"
WARMS = "check_schedule.check_a_warm_up_ends_where_the_schedule_goes_on"
FALLS = "check_schedule.check_a_schedule_does_not_rise_again"
EXACT = 1e-6  # of the highest rate: rounding
FLAT = 1e-3  # of the highest rate: less than training shows
SLOPES = 2.5  # steps by which conventions of counting differ, and half of one
FEW = 4  # steps that a warm-up has to have for its line to be seen


def check_a_schedule_keeps_its_bounds(subject: Subject) -> None:
    """A schedule must give finite learning rates from 0 to the maximum that it declares."""
    note(judged=judged(subject, "schedule", judge=lambda one: expect_bounds(met_schedule(subject, one))))


def expect_bounds(met: MetSchedule) -> float:
    one, declared = met.companion, met.declared
    for step, rate in met.rates.items():
        if step <= met.spoken and not (math.isfinite(rate) and rate >= 0):
            fail(
                f"{one.name} gives {rate:.4g} at step {step}, should be a learning rate of 0 or more{within(met)}",
                where=one.where,
                likely=("schedule-falls-below-zero",),
                advice="Clamp the progress to 1, or the rate to its minimum: max(min_lr, rate).",
                step=step,
            )
    peak, top = declared.peak, max(rate for step, rate in met.rates.items() if step <= met.spoken)
    if peak is not None and top > peak * (1 + EXACT):
        step = next(k for k, v in met.rates.items() if v == top)
        added = met.least and math.isclose(top, peak + met.least, rel_tol=1e-3)
        if not added and not declared.names_a_maximum:
            advise(f"{one.name} gives up to {top:.4g} for a {declared.name('peak')} of {peak:.4g}")
            return top
        fail(
            f"{one.name} gives {top:.4g} at step {step}, should be at most {peak:.4g} ({declared.name('peak')})"
            + (f": the minimum {met.least:.4g} is added on top" if added else ""),
            where=one.where,
            likely=("schedule-adds-its-minimum",),
            advice="Interpolate: min_lr + share * (max_lr - min_lr), with a share from 1 down to 0.",
            got=top,
            want=peak,
        )
    return top


def within(met: MetSchedule) -> str:
    return f" until its last step, {met.end:.6g}" if met.declared.ends else ""


@needs(BOUNDS)
def check_a_warm_up_ends_where_the_schedule_goes_on(subject: Subject) -> None:
    """A warm-up must rise to the rate from which the schedule goes on: no jump at its end."""
    note(judged=judged(subject, "schedule", judge=lambda one: expect_no_jump(met_schedule(subject, one))))


def expect_no_jump(met: MetSchedule) -> float:
    one, rates, W = met.companion, met.rates, math.ceil(met.declared.warmup or 0)
    if W < FEW or W + 4 > met.end or not all(k in rates for k in range(W - 4, W + 4) if k):
        raise NotApplicable("it declares no warm-up of some steps")
    first, last = W - 4, W - 2
    if rates[first] > rates[last] * (1 + EXACT):
        fail(
            f"{one.name} falls during its warm-up of {W} steps, from {rates[first]:.6g} at step {first} to "
            f"{rates[last]:.6g} at step {last}: there is no warm-up",
            where=one.where,
            likely=("schedule-without-its-warm-up",),
            advice="Before the end of the warm-up, give max_lr * step / warmup_steps.",
        )
    jumps = {}
    for k in (W, W + 1):
        heading = 2 * rates[k - 1] - rates[k - 2]
        bend = abs(rates[k - 1] - 2 * rates[k - 2] + rates[k - 3]) if k > FEW else 0.0
        slope = max(abs(rates[k + 1] - rates[k]), abs(rates[k + 2] - rates[k + 1]))
        off = min(abs(heading - rates[k]), abs(rates[k - 1] - rates[k]))
        if off > SLOPES * slope + 2 * bend + FLAT * met.top:
            jumps[k] = off
    if jumps:
        k = max(jumps, key=lambda k: jumps[k])
        why, likely, advice = jump_explained(met, k)
        fail(
            f"{one.name} jumps at the end of its warm-up of {W} steps: {rates[k - 2]:.4g}, {rates[k - 1]:.4g} at step "
            f"{k - 1}, then {rates[k]:.4g} and {rates[k + 1]:.4g}: {why}",
            where=one.where,
            likely=(likely,),
            advice=advice,
            rates=[rates[k + d] for d in range(-3, 3)],
        )
    return rates[W]


def jump_explained(met: MetSchedule, k: int) -> tuple[str, str, str]:
    """What the rates around step `k` look like, the known bug, the advice."""
    before, after, near = met.rates[k - 1], met.rates[k], FLAT * met.top
    if before <= near:
        return "it stays at 0 during the warm-up", "warm-up-divides-integers", "Use / and not // for its share."
    if met.least is not None and abs(after - met.least) < 10 * near:
        return (
            "the decay starts at the minimum",
            "schedule-swaps-maximum-and-minimum",
            "min_lr + share * (max_lr - min_lr), with a share from 1 down to 0.",
        )
    return (
        "the decay does not start where the warm-up ends",
        "decay-counts-the-warm-up",
        "Count the decay from the end of the warm-up: (step - warmup_steps) / (max_steps - warmup_steps).",
    )


@needs(BOUNDS, WARMS)
def check_a_schedule_does_not_rise_again(subject: Subject) -> None:
    """Once a schedule without restarts has fallen, it must not rise again."""
    note(judged=judged(subject, "schedule", judge=lambda one: expect_falling(met_schedule(subject, one))))


def expect_falling(met: MetSchedule) -> str:
    one, top = met.companion, met.top
    if met.restarts:
        raise NotApplicable("it has cycles or restarts")
    steps = list(met.rates)
    fell: int | None = None
    for before, after in pairwise(steps):
        change = met.rates[after] - met.rates[before]
        if after > met.end - 1:
            break
        if change < -EXACT * top and fell is None:
            fell = before
        if change > EXACT * top and fell is not None:
            low = min(v for k, v in met.rates.items() if fell <= k < after)
            high = max(v for k, v in met.rates.items() if after <= k <= met.end)
            fail(
                f"{one.name} falls from step {fell} on and rises again from step {before}: from {low:.4g} to "
                f"{high:.4g}{within(met)}",
                where=one.where,
                likely=("cosine-runs-twice-as-far", "schedule-swaps-maximum-and-minimum"),
                advice="A decay is half a cosine: 0.5 * (1 + math.cos(math.pi * progress)), with a progress from 0 to "
                "1, in radians.",
                low=low,
                high=high,
            )
    expect_at_rest(met)
    return "" if fell is None else f"falls from step {fell}"


def expect_at_rest(met: MetSchedule) -> None:
    """After the last declared step: a decay that training outlives must stay down, others had better."""
    one, last = met.companion, [k for k in met.rates if k <= met.end][-1]
    later = {k: v for k, v in met.rates.items() if k > met.end}
    wrong = {k: v for k, v in later.items() if v > met.rates[last] + FLAT * met.top or v < -EXACT * met.top}
    if not wrong:
        return
    step, rate = max(wrong.items(), key=lambda item: abs(item[1]))
    says = f"{one.name} gives {rate:.4g} at step {step}, after its last step {last} ({met.rates[last]:.4g})"
    if met.declared.goes_on:
        fail(
            f"{says}: it {'rises again' if rate > 0 else 'falls below 0'}, and {met.declared.name('total')} is where "
            "the decay ends, not the training",
            where=one.where,
            likely=("schedule-rises-after-its-end",),
            advice="After the last step of the decay, return min_lr; or clamp the progress: min(1.0, progress).",
        )
    advise(f"{says}: clamp its progress to 1 if training may go on")


@needs(BOUNDS, WARMS, FALLS)
def check_a_schedule_ends_at_its_minimum(subject: Subject) -> None:
    """A cosine or linear decay must reach the minimum that it declares at its last declared step."""
    note(judged=judged(subject, "schedule", judge=lambda one: expect_end(met_schedule(subject, one))))


def expect_end(met: MetSchedule) -> float:
    one, declared, least = met.companion, met.declared, met.least
    if least is None or not declared.ends:
        raise NotApplicable("it does not declare both its last step and its minimum")
    if met.restarts:
        raise NotApplicable("it has cycles or restarts")
    lasts = {end: met.near(end) for end in declared.ends if met.near(end)}
    if not any(met.cosine or is_straight(met, end) for end in lasts):
        raise NotApplicable("it is neither a cosine nor a straight line that would have to end there")
    off = {end: missed(met, end, near, least) for end, near in lasts.items()}
    if off and all(off.values()):
        end = min(off, key=lambda end: off[end])
        got = met.rates[max(k for k in met.rates if k <= end)]
        fail(
            f"{one.name} gives {got:.4g} at its last step ({declared.name('total')} = {end:.6g}), should be {least:.4g}"
            f" ({declared.name('least' if declared.least is not None else 'ratio')})",
            where=one.where,
            likely=("decay-stops-short", "cosine-in-degrees"),
            advice="progress = (step - warmup_steps) / (max_steps - warmup_steps) is 1 at the last step; in radians, "
            "math.cos(math.pi * progress).",
            got=got,
            want=least,
        )
    return least


def missed(met: MetSchedule, end: float, near: dict[int, float], least: float) -> float:
    """How far from the minimum it ends, 0 within the steps of counting. A minimum may be a share of the maximum."""
    last = [v for k, v in met.rates.items() if k <= end][-4:]
    slope = max((abs(b - a) for a, b in pairwise(last)), default=0.0)
    off = min(abs(rate - low) for rate in near.values() for low in (least, least * met.top))
    return off if off > SLOPES * slope + FLAT * met.top else 0.0


def is_straight(met: MetSchedule, end: float) -> bool:
    """Whether it falls in a straight line before its end."""
    last = [v for k, v in met.rates.items() if k <= end - 1][-6:]
    steps = [b - a for a, b in pairwise(last)]
    return len(steps) == 5 and max(steps) < 0 and max(steps) - min(steps) < 1e-3 * abs(steps[0])
