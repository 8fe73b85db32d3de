"""A module and the running code are placed at a line of the subject's own code, never of PyTorch's or ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from transformer_checks.checks.watch.location import line_now, locate


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x)


def source_line(number: int) -> str:
    return Path(__file__).read_text(encoding="utf-8").splitlines()[number - 1]


def test_a_pytorch_module_is_placed_at_the_line_that_calls_it():
    where = locate(Model(), "last")
    assert (where.module, where.type) == ("last", "Linear")
    assert Path(where.file).name == "test_watch_location.py"
    assert "self.last(x)" in source_line(where.line)


def test_a_module_of_the_subject_is_placed_at_its_forward():
    where = locate(nn.Sequential(Model()), "0")
    assert (where.module, where.type) == ("0", "Model")
    assert "def forward" in source_line(where.line)


def test_the_running_line_of_the_subject_is_found():
    found = []

    class Spy(nn.Module):
        def forward(self, x):
            found.append(line_now())
            return x

    nn.Sequential(Spy())(torch.zeros(1))
    assert found[0].type == "Spy"
    assert "found.append" in source_line(found[0].line)
