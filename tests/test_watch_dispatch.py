"""Dispatch modes of ours: without PyTorch's compiler unless the model uses it, and beside a model that does."""

import subprocess
import sys

import torch

from transformer_checks.checks.watch.arithmetic import operations_of


def test_a_mode_imports_no_compiler():
    code = (
        "import sys, torch; from transformer_checks.checks.watch.arithmetic import operations_of; "
        "print(len(operations_of(lambda: torch.ones(2) + 1)), 'torch._dynamo' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["2", "False"]


def test_a_compiled_model_is_recorded_and_does_not_capture_the_mode():
    layer = torch.nn.Linear(3, 3)
    compiled = torch.compile(layer, backend="eager")
    x = torch.ones(2, 3)
    want = layer(x)
    found = []
    log = operations_of(lambda: found.append(compiled(x)))
    assert torch.equal(found[0], want)
    assert any("addmm" in name for name, *_ in log)
