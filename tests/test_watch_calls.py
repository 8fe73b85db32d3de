"""The first wrong module is named, whatever modules return, however often they run, and whoever calls forward."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_checks.checks.watch.calls import first_bad, first_breaking, recorded, tensors

Pair = namedtuple("Pair", "hidden extra")


@dataclass
class Output:
    hidden: torch.Tensor
    cache: object = None


class Step(nn.Module):
    """Adds its number; if `spoiled`, it adds one more."""

    def __init__(self, number: float, form=lambda x: x):
        super().__init__()
        self.number, self.form, self.spoiled = number, form, False

    def forward(self, x):
        return self.form(x + self.number + (1.0 if self.spoiled else 0.0))


class Chain(nn.Module):
    def __init__(self, *steps: nn.Module):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        for step in self.steps:
            x = step.forward(x)  # directly: hooks would miss it
            x = x if isinstance(x, torch.Tensor) else x[0] if isinstance(x, tuple) else getattr(x, "hidden", None)
        return self.last(x)


FORMS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "named tuple": lambda x: Pair(x, 1),
    "dataclass": lambda x: Output(x),
}


def spoil(model, index):
    def run(spoiled):
        model.steps[index].spoiled = spoiled
        return model(torch.zeros(2, 3))

    return lambda: run(False), lambda: run(True)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_first_module_with_right_inputs_and_a_wrong_output_is_named(form):
    model = Chain(*(Step(float(n), form) for n in range(4)))
    run, again = spoil(model, 2)
    where = first_breaking(model, run, again, lambda a, b: not torch.equal(a, b))
    assert where is not None
    assert (where.module, where.type) == ("steps.2", "Step")
    assert Path(where.file).name == "test_watch_calls.py"
    line = Path(__file__).read_text().splitlines()[where.line - 1]
    assert "def forward" in line


def test_a_shared_module_is_recorded_under_its_first_name_with_the_number_of_the_call():
    step = Step(1.0)
    model = Chain(step, step, step)
    with recorded(model) as calls:
        model(torch.zeros(1, 3))
    assert [(call.module, call.nth) for call in calls] == [
        ("steps.0", 0), ("steps.0", 1), ("steps.0", 2), ("last", 0), ("Chain", 0)
    ]  # fmt: skip


def test_a_call_made_in_one_run_only_does_not_misalign_the_others():
    class Sometimes(Chain):
        def forward(self, x):
            if x.sum() > 0:
                self.steps[0](x)
            return self.last(self.steps[1](x))

    model = Sometimes(Step(0.0), Step(1.0))
    where = first_breaking(
        model, lambda: model(torch.zeros(1, 3)), lambda: model(torch.ones(1, 3)), lambda a, b: not torch.equal(a, b)
    )
    assert where is None  # every difference comes from the input


def test_the_module_that_makes_a_nan_is_named():
    class Log(nn.Module):
        def forward(self, x):
            return (x - 100).log()

    model = Chain(Step(0.0), Log(), Step(0.0))
    where = first_bad(model, lambda: model(torch.zeros(1, 3)), lambda t: not bool(t.isfinite().all()))
    assert where is not None and where.type == "Log"


def test_recorded_tensors_do_not_change_afterwards():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.add_(1)

    model = nn.Sequential(InPlace(), InPlace())
    with recorded(model) as calls:
        model(torch.zeros(1))
    assert [float(call.inputs[0]) for call in calls] == [0, 1, 0]
    assert [float(call.outputs[0]) for call in calls] == [1, 2, 2]


def test_forwards_are_restored():
    model = Chain(Step(1.0))
    model.steps[0].forward = lambda x: x * 7  # someone else's wrapper, as libraries leave them
    before = model.steps[0].forward
    with pytest.raises(ZeroDivisionError), recorded(model):
        raise ZeroDivisionError
    assert model.steps[0].forward is before
    assert "forward" not in model.__dict__ and "forward" not in model.last.__dict__


def test_tensors_are_found_in_objects_and_cyclic_references_end():
    class Cache:
        def __init__(self):
            self.layers = [Output(torch.ones(2))]
            self.myself = self

    assert any(t.shape == (2,) for t in tensors({"cache": Cache(), "ids": torch.zeros(3, dtype=torch.long)}))
    assert not tensors((nn.Linear(2, 2), torch.ones, "text", None))
