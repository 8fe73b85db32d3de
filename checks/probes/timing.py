"""Timing in rounds: each round runs everything once, so that other load on the machine affects all runs alike.

On a shared machine only ratios of times from the same rounds mean anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

Runs = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and the interval that holds it with 95 % confidence (bootstrap)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def in_turn(
    runs: Runs,
    rounds: int,
    *,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    patience: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each run in each round, after `warmup` uncounted rounds; every other round goes in reverse order.

    After `patience` seconds no further round starts, but at least three are made.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    until = time.monotonic() + patience
    for turn in range(-warmup, rounds):
        if turn >= 3 and time.monotonic() > until:
            break
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            spent = timed(runs[name], device, clock)
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def timed(
    run: Callable[[], object], device: torch.device | str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds until all work that the run gives the device is done."""
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device | str) -> None:
    """Waits for the device; a call returns before the GPU kernels that it started are done."""
    if torch.device(device).type not in ("cpu", "meta"):
        torch.accelerator.synchronize(torch.device(device))


class Marks:
    """The time between marks in one run, by name; on CUDA measured by events, which do not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            synchronize(self.device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def mark(self, name: str) -> None:
        """Names what has run since the previous mark."""
        self.marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        synchronize(self.device)
        return {name: self._between(start, end) for (_, start), (name, end) in pairwise(self.marks)}

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start)


def ratio(times: Sequence[float], of: Sequence[float]) -> Ratio:
    """`times` as a multiple of `of`, both from the same rounds."""
    return interval(np.asarray(times) / np.asarray(of))


def interval(values: Sequence[float] | np.ndarray) -> Ratio:
    """The median of values from all rounds, and its 95 % interval."""
    found = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(found), size=(2000, len(found)))
    low, high = np.percentile(np.median(found[drawn], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(found)), float(low), float(high))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The exponent k of the power law seconds ~ size^k that fits best, in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth(sizes: Sequence[float], rounds: Sequence[Sequence[float]]) -> Ratio:
    """The exponent of growth, fitted to each round (the seconds of every size): median and interval."""
    return interval([exponent(sizes, seconds) for seconds in rounds])
