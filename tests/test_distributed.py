"""Two processes under torchrun train as one does, on the same data; when one dies the other says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from transformer_checks.transformer import checkpoint
from transformer_checks.transformer.__main__ import main
from transformer_checks.transformer.data import pad_batch
from transformer_checks.transformer.metrics import read_metrics
from transformer_checks.transformer.model import ModelConfig, Transformer
from transformer_checks.transformer.train_config import TrainConfig
from transformer_checks.transformer.trainer import Trainer, next_token_objective

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="this build of torch has no torch.distributed"),
    pytest.mark.skipif(os.name != "posix", reason="torchrun's gloo is tested on POSIX systems only"),
]

CONFIG = TrainConfig(
    steps=8, stop_loss=None, batch_size=4, micro_batch_size=1, learning_rate=0.01, warmup_steps=2, clip_norm=0.1,
    eval_interval=4, save_interval=2,
)  # fmt: skip


class Rows:
    """13 sequences of unequal lengths: windows of 4, 4, 4 and 1, the last of which leaves a process without any."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.train = [torch.randint(9, (2 + i % 7,), generator=generator).tolist() for i in range(13)]
        self.validation = self.train[:3]

    def batch(self, rows):
        return pad_batch(rows)


class Recorded(Trainer):
    """Keeps the examples and the gradient of every step."""

    def __init__(self, *given, **named) -> None:
        super().__init__(*given, **named)
        self.examples: list[list] = []
        self.gradients: list[list[torch.Tensor]] = []

    def backward(self, examples, weight):
        if weight:
            self.examples += [(self.steps_done, row) for row in examples]
        return super().backward(examples, weight)

    def clip(self) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in self.parameters])
        super().clip()


def recorded(folder: Path, objective=next_token_objective) -> Recorded:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=9, block_size=8, n_embd=8, n_head=2))
    return Recorded(model, Rows(), CONFIG, objective, folder=folder)


def torchrun(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


TOGETHER = """
import sys
from pathlib import Path
import torch
from test_distributed import recorded
from transformer_checks.transformer.distributed import joined

folder = Path(sys.argv[1])
with joined("cpu"):
    trainer = recorded(folder)
    trainer.train()
    rank = trainer.processes.rank
    assert trainer.processes.count == 2
    torch.save((trainer.examples, trainer.gradients, trainer.evaluate(trainer.data.train)), folder / f"{rank}.pt")
"""


def test_two_processes_train_as_one_on_the_same_data(tmp_path):
    alone = recorded(tmp_path / "alone")
    alone.train()
    (tmp_path / "together.py").write_text(TOGETHER)
    together = tmp_path / "together"
    done = torchrun("together.py", together, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (first, gradients, loss), (second, same_gradients, same_loss) = (torch.load(together / f"{r}.pt") for r in (0, 1))

    assert sorted(first + second) == sorted(alone.examples)  # every example once, at its step
    assert [len([e for e in second if e[0] == step]) for step in range(4)] == [2, 2, 2, 0]

    for step, expected in enumerate(alone.gradients):
        for mine, other, single in zip(gradients[step], same_gradients[step], expected, strict=True):
            assert mine.equal(other)
            torch.testing.assert_close(mine, single, rtol=0, atol=1e-6)
    assert len(gradients) == len(alone.gradients) == 8

    assert loss == same_loss == pytest.approx(alone.evaluate(alone.data.train), abs=1e-6)
    records, expected = (read_metrics(folder / "metrics.jsonl") for folder in (together, tmp_path / "alone"))
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    for record, single in zip(records, expected, strict=True):
        for name in {"loss", "validation_loss"} & record.keys():
            assert record[name] == pytest.approx(single[name], abs=1e-5)


def test_the_command_line_under_torchrun_trains_resumes_and_the_result_is_one_models(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    small = ["train", "--n_embd", "16", "--n_head", "2", "--batch_size", "5", "--stop_loss", "null"]
    for options in (["--steps", "4"], ["--steps", "8", "--resume"]):
        done = torchrun("-m", "transformer_checks.transformer", *small, *options, "--out", "two", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("two/checkpoint.pt") == 1  # one of them speaks
    assert main([*small, "--steps", "8", "--out", "one"]) == 0
    two, one = (checkpoint.load(f"{name}/checkpoint.pt") for name in ("two", "one"))
    assert two["trainer"]["steps_done"] == 8 and len(two["trainer"]["random"]) == 2
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=0, atol=1e-4)  # Adam: 1e-6 of a gradient near 0
    capfd.readouterr()
    assert main(["generate", "--checkpoint", "two/checkpoint.pt"]) == 0
    assert len(capfd.readouterr().out) == 24


DYING = """
import os, sys
from pathlib import Path
from test_distributed import recorded
from transformer_checks.transformer.distributed import ProcessLost, joined
from transformer_checks.transformer.trainer import next_token_objective

def objective(model, batch):
    if trainer.steps_done == 5 and trainer.processes.rank == int(sys.argv[2]):
        os._exit(9)
    return next_token_objective(model, batch)

try:
    with joined("cpu"):
        trainer = recorded(Path(sys.argv[1]), objective)
        trainer.train()
except ProcessLost as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("dying", [0, 1])  # the first writes the files
def test_when_one_process_dies_the_other_says_so_and_the_last_checkpoint_loads(dying, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun("dying.py", "out", dying, cwd=tmp_path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    for words in (f"process {1 - dying} of 2", "step 6", "another has ended", "checkpoint.pt holds step 4"):
        assert words in said[0]
    again = recorded(tmp_path / "out")
    again.resume(tmp_path / "out" / "checkpoint.pt")
    assert again.steps_done == 4
    again.train()
    assert again.steps_done == 8
