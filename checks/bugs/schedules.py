"""Wrong schedules of the learning rate."""

from __future__ import annotations

import math
from types import SimpleNamespace

from ..check_schedule import (
    check_a_schedule_does_not_rise_again,
    check_a_schedule_ends_at_its_minimum,
    check_a_schedule_keeps_its_bounds,
    check_a_warm_up_ends_where_the_schedule_goes_on,
)
from . import bug
from .toolbox import parts_with_companions, replace


@bug("a linear schedule falls below 0", check_a_schedule_keeps_its_bounds, of=parts_with_companions)
def schedule_falls_below_zero(parts: SimpleNamespace) -> None:
    def linear_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        return max_lr * (1 - step / (max_steps - warmup_steps))

    replace(parts, "schedule", linear_schedule)


@bug(
    "a schedule adds its minimum instead of going down to it: its peak is above its maximum",
    check_a_schedule_keeps_its_bounds,
    of=parts_with_companions,
)
def schedule_adds_its_minimum(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        return min_lr + 0.5 * max_lr * (1 + math.cos(math.pi * step / max_steps))

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a decay counts the steps of the warm-up: the rate jumps where the warm-up ends",
    check_a_warm_up_ends_where_the_schedule_goes_on,
    of=parts_with_companions,
)
def decay_counts_the_warm_up(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        return min_lr + 0.5 * (1 + math.cos(math.pi * step / max_steps)) * (max_lr - min_lr)

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a warm-up divides integers: it stays at 0 and then jumps",
    check_a_warm_up_ends_where_the_schedule_goes_on,
    of=parts_with_companions,
)
def warm_up_divides_integers(parts: SimpleNamespace) -> None:
    def linear_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step // warmup_steps)
        return max_lr * (max_steps - step) / (max_steps - warmup_steps)

    replace(parts, "schedule", linear_schedule)


@bug(
    "a schedule takes no notice of its warm-up",
    check_a_warm_up_ends_where_the_schedule_goes_on,
    of=parts_with_companions,
)
def schedule_without_its_warm_up(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps))) * max_lr

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a decay is a whole cosine: it goes down and up again",
    check_a_schedule_does_not_rise_again,
    of=parts_with_companions,
)
def cosine_runs_twice_as_far(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (max_steps - warmup_steps))
        return min_lr + 0.5 * (1 + math.cos(2 * math.pi * progress)) * (max_lr - min_lr)

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a schedule without a clamp rises again after the last step of its decay",
    check_a_schedule_does_not_rise_again,
    of=parts_with_companions,
)
def schedule_rises_after_its_end(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, warmup_steps: int, lr_decay_steps: int, max_lr: float, min_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / (lr_decay_steps - warmup_steps)
        return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)

    replace(parts, "schedule", cosine_schedule)


@bug(
    "maximum and minimum change places in a decay: it starts at the minimum and rises",
    check_a_schedule_ends_at_its_minimum,
    of=parts_with_companions,
)
def schedule_swaps_maximum_and_minimum(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        progress = min(1.0, step / max_steps)
        return max_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (min_lr - max_lr)

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a decay divides by all steps: it stops before its minimum",
    check_a_schedule_ends_at_its_minimum,
    of=parts_with_companions,
)
def decay_stops_short(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max_steps)
        return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)

    replace(parts, "schedule", cosine_schedule)


@bug(
    "a cosine gets degrees where it takes radians: the rate hardly falls",
    check_a_schedule_ends_at_its_minimum,
    of=parts_with_companions,
)
def cosine_in_degrees(parts: SimpleNamespace) -> None:
    def cosine_schedule(step: int, max_steps: int, max_lr: float, min_lr: float) -> float:
        progress = min(1.0, step / max_steps)
        return min_lr + 0.5 * (1 + math.cos(math.radians(math.pi * progress))) * (max_lr - min_lr)

    replace(parts, "schedule", cosine_schedule)
