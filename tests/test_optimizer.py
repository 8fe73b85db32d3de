"""The optimizers of the trainer: the steps of torch's, without torch's compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from transformer_checks.transformer import optimizer as ours
from transformer_checks.transformer.optimizer import build_optimizer
from transformer_checks.transformer.train_config import TrainConfig

KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def both(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer]:
    """The same model with our optimizer and with torch's, in the same groups."""
    model = small_model()
    other = copy.deepcopy(model)
    config = TrainConfig(optimizer=kind, weight_decay=0.1)
    mine = build_optimizer(model, config)
    theirs = build_optimizer(other, config)
    options = {name: value for name, value in theirs.defaults.items() if name in ("lr", "betas", "eps", "fused")}
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in theirs.param_groups]
    return model, mine, other, KINDS[kind](groups, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_torch_bit_for_bit(kind):
    model, mine, other, theirs = both(kind)
    assert type(mine).__mro__[1] is ours.Uncompiled and isinstance(mine, KINDS[kind])
    for got, expected in zip(steps(model, mine), steps(other, theirs), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_saved_by_torchs_optimizer_goes_on_in_ours_and_back(kind):
    model, mine, other, theirs = both(kind)
    steps(other, theirs)
    model.load_state_dict(other.state_dict())
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(steps(model, mine), steps(other, theirs), strict=True))
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(steps(model, mine), steps(other, theirs), strict=True))


def test_a_step_runs_its_hooks_once_and_records_no_gradient():
    model, mine, _, theirs = both("adam")
    seen = []
    for optimizer in (mine, theirs):
        optimizer.register_step_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    steps(model, mine, 1)
    assert seen == [True, "after"]
    assert not any(parameter.grad_fn for parameter in model.parameters())


# In processes of their own: here another test may have imported the compiler, or made an optimizer of torch's.
TRAINS = """
import sys
import torch
from torch import nn
from transformer_checks.transformer.data import SentenceTask
from transformer_checks.transformer.train_config import TrainConfig
from transformer_checks.transformer.trainer import Trainer

def trained(compile=lambda function: function):
    torch.manual_seed(0)
    task = SentenceTask()
    V = task.tokenizer.vocab_size
    trainer = Trainer(nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V)), task, TrainConfig(), objective)
    for name in ("step", "zero_grad"):
        setattr(trainer.optimizer, name, compile(getattr(trainer.optimizer, name)))
    for _ in range(2):
        trainer.step()
    return trainer

def objective(model, batch):
    logits = model(batch.tokens).flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch.targets.flatten(), reduction="sum"), batch.mask.sum()

plain = trained()
plain.save(sys.argv[1])
trained().resume(sys.argv[1])
assert "torch._dynamo" not in sys.modules, "the compiler was imported"

compiled = trained(lambda function: torch.compile(function, backend="eager"))
assert "torch._dynamo" in sys.modules
for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
    assert torch.allclose(a, b, atol=1e-6)
weights = torch.ones(3, requires_grad=True)
theirs = torch.optim.Adam([weights], lr=0.1)
weights.sum().backward()
torch.compile(theirs.step, backend="eager")()
assert torch.allclose(weights, torch.full((3,), 0.9))
theirs.zero_grad()
assert weights.grad is None
"""

TORCH_FIRST = """
import torch
weights = torch.ones(3, requires_grad=True)
torch.optim.Adam([weights])  # the first one wraps `step` of its class once more, to call hooks
from transformer_checks.transformer.optimizer import Adam
mine, seen = Adam([weights], lr=0.1), []
mine.register_step_pre_hook(lambda *_: seen.append(1))
weights.sum().backward()
mine.step()
assert seen == [1], seen
assert torch.allclose(weights, torch.full((3,), 0.9))
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def test_training_and_checkpoints_do_without_the_compiler_which_works_afterwards(tmp_path):
    done = run_python(TRAINS, str(tmp_path / "checkpoint.pt"))
    assert done.returncode == 0, done.stderr


def test_hooks_run_once_also_where_torchs_optimizer_came_first():
    done = run_python(TORCH_FIRST)
    assert done.returncode == 0, done.stderr
