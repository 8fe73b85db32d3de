"""Modules that leave out, in training, what they add for some rows of a batch and not for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..watch.calls import Call, recorded
from ..watch.dropout import training_alone

RUNS, FEW = 24, 5
VALUES = 4  # of one row: with two branches, each of them left out or not
EQUAL = 1e-9  # relative, in float64


@dataclass(frozen=True)
class Left:
    """A module that leaves out a branch for this share of the rows; whether it gives others what evaluation gives."""

    module: str
    share: float
    kept_as_evaluated: bool


def rows_left_out(model: nn.Module, module: nn.Module, name: str, run: Callable[[int], Any]) -> Left | None:
    """What the module alone in training does; None if it does not leave out whole rows of a branch.

    A row then has one of a few values, among them its input, or zero, and rows differ in which. A layer that is skipped
    by the whole batch at once (LayerDrop) is none of these: it is not rescaled by design.
    """
    with training_alone(model), recorded(model) as calls:
        run(0)
    calm = _first(calls, name)
    if calm is None:
        return None
    plain = calm.outputs[0]
    bound = EQUAL * float(plain.abs().max())
    around = [x for x in calm.inputs if x.shape == plain.shape and not _alike(x, plain, bound)]
    nothing = [torch.zeros_like(plain), *around]
    rows: list[list[Tensor]] = []
    for seed in range(RUNS):
        with training_alone(model, module), recorded(model) as calls:
            run(seed)
        found = _first(calls, name)
        if found is None or found.outputs[0].shape != plain.shape:
            return None
        rows.append(list(found.outputs[0]))
        if seed == FEW and all(_alike(row, plain[b], bound) for each in rows for b, row in enumerate(each)):
            return None  # it is not random, or hardly ever
    out = torch.stack([torch.stack(each) for each in rows])  # [runs, B, …]
    gone = [[any(_alike(x, nil[b], bound) for nil in nothing) for b, x in enumerate(each)]
            for each in rows]  # fmt: skip
    if not any(len(set(each)) == 2 for each in gone) or _most_values(out, bound) > VALUES:
        return None
    same = sum(_alike(x, plain[b], bound) for each in rows for b, x in enumerate(each)) / (len(rows) * len(plain))
    return Left(name, 1 - same if same else sum(map(sum, gone)) / (len(rows) * len(plain)), same > 0)


def _first(calls: list[Call], name: str) -> Call | None:
    return next((call for call in calls if call.module == name and call.outputs), None)


def _alike(x: Tensor, other: Tensor, bound: float) -> bool:
    return float((x - other).abs().max()) <= bound


def _most_values(out: Tensor, bound: float) -> int:
    """The most values that a row has in all runs. out: [runs, B, …]."""
    most = 0
    for b in range(out.shape[1]):
        values: list[Tensor] = []
        for x in out[:, b]:
            if not any(_alike(x, value, bound) for value in values):
                values.append(x)
        most = max(most, len(values))
    return most
