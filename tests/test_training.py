"""Many steps of the trainer: where it ends, what it writes, what goes wrong, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.small_trainer import PLAIN, SMALL, Rows, assert_equal, trainer, weights
from transformer_checks.transformer import checkpoint
from transformer_checks.transformer.data import SentenceTask
from transformer_checks.transformer.generation import generate
from transformer_checks.transformer.metrics import read_metrics
from transformer_checks.transformer.model import ModelConfig, Transformer, gpt2, llama
from transformer_checks.transformer.train_config import PUBLISHED, TrainConfig
from transformer_checks.transformer.trainer import Diverged, Trainer, next_token_objective


def test_training_ends_at_the_threshold_or_at_the_cap():
    ours = trainer(replace(PLAIN, steps=4))
    ours.train()
    assert ours.steps_done == 4
    ours = trainer(replace(PLAIN, steps=400, stop_loss=1.0))
    ours.train()
    losses = [record["loss"] for record in ours.metrics.records() if "loss" in record]
    assert losses[-1] <= 1.0 < min(losses[:-1]) and len(losses) == ours.steps_done < 400


@pytest.mark.parametrize("log_interval", [1, 4])
def test_metrics_have_every_step_and_every_evaluation(tmp_path, log_interval):
    config = replace(PLAIN, log_interval=log_interval, eval_interval=3, clip_norm=1.0, warmup_steps=2)
    ours = trainer(config, folder=tmp_path)
    ours.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    assert [r["learning_rate"] for r in steps] == [0.005] + [0.01] * 5
    assert all(r["gradient_norm"] > 0 for r in steps)
    assert evaluations[-1]["validation_loss"] == ours.evaluate(ours.data.validation)
    assert all(r["peak_memory"] > 2**20 and r["seconds"] >= 0 for r in evaluations)
    again = trainer(config, folder=None)
    again.train()
    assert [r["loss"] for r in again.metrics.records() if "loss" in r] == [r["loss"] for r in steps]


RECIPES = {
    "gpt2": gpt2(), "llama": llama(), "untied": gpt2(tied=False), "explicit": gpt2(attention="explicit"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_the_quick_recipe_learns_the_sentence_within_sixty_steps(config, skip, seed):
    task = SentenceTask(skip=skip)
    torch.manual_seed(seed)
    ours = Trainer(Transformer(config), task, TrainConfig(steps=60, seed=seed))
    ours.train()
    assert ours.evaluate(task.test) <= 1e-5
    ids = task.tokenizer.encode(task.sentence)
    prompt = torch.tensor([[task.tokenizer.begin, *ids[:skip]]] * 10)
    for temperature in (0.0, 0.1):
        tokens = generate(
            ours.model, prompt, 23 - skip, temperature=temperature, generator=torch.Generator().manual_seed(seed)
        )
        assert {task.tokenizer.decode(row) for row in tokens} == {task.sentence}


def test_the_sentence_is_learned_in_bfloat16():
    torch.manual_seed(0)
    ours = Trainer(Transformer(gpt2()), SentenceTask(), TrainConfig(precision="bfloat16", steps=300))
    ours.train()
    assert ours.evaluate(ours.data.test) <= 2e-5  # the last update moves a loss of bfloat16 a little


# --- what goes wrong


def failing_at(step: int, value: float):
    """An objective whose loss is `value` at a step."""
    done = 0

    def objective(model, batch):
        nonlocal done
        total, count = next_token_objective(model, batch)
        if model.training:
            done += 1
        return (total * value if done == step and model.training else total), count

    return objective


@pytest.mark.parametrize("log_interval", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_the_last_finite_checkpoint_stays(tmp_path, value, log_interval):
    config = replace(PLAIN, steps=20, save_interval=2, log_interval=log_interval)
    ours = trainer(config, folder=tmp_path, objective=failing_at(6, value))
    with pytest.raises(Diverged) as diverged:
        ours.train()
    for said in ("at step 6", str(value), "0.01", f"{tmp_path / 'checkpoint.pt'} holds step 4"):
        assert said in str(diverged.value)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["trainer"]["steps_done"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[5]) == {"step": 6, "loss": None, "learning_rate": 0.01}


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    ours = trainer(replace(PLAIN, save_interval=2), folder=tmp_path)
    tick = ours.tick

    def tick_and_break():
        tick()
        if ours.steps_done == 4:
            ours.model.norm.weight.data[0] = math.inf

    ours.tick = tick_and_break
    with pytest.raises(Diverged, match=r"after step 4.*holds step 2"):
        ours.train()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["trainer"]["steps_done"] == 2


def test_without_a_checkpoint_the_error_does_not_promise_one():
    with pytest.raises(Diverged, match="no checkpoint has been saved"):
        trainer(objective=failing_at(1, math.nan)).train()


def interrupting_at(step: int):
    done = 0

    def objective(model, batch):
        nonlocal done
        done += 1
        if done == step:
            signal.raise_signal(signal.SIGINT)
        return next_token_objective(model, batch)

    return objective


def test_ctrl_c_lets_the_step_end_saves_and_raises(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    ours = trainer(replace(PLAIN, steps=50), folder=tmp_path, objective=interrupting_at(3))
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert signal.getsignal(signal.SIGINT) is handler
    uninterrupted = trainer(replace(PLAIN, steps=50))
    for _ in range(3):
        uninterrupted.step()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["trainer"]["steps_done"] == 3
    assert_equal(weights(ours), weights(uninterrupted))


def test_an_unwritable_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    ours = trainer(folder=tmp_path / "file" / "out")
    with pytest.raises(OSError, match="Not a directory"):
        ours.train()
    assert ours.steps_done == 0


def test_a_device_that_is_not_there_is_named():
    for device in ("cuda:97", "abacus"):
        with pytest.raises(ValueError, match=device):
            trainer(replace(PLAIN, device=device))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("micro_batch_size", 0), ("log_interval", 0), ("save_interval", -1),
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("clip_norm", 0.0), ("beta1", 1.0), ("beta2", -0.1),
        ("weight_decay", -1.0), ("stop_loss", -1.0), ("optimizer", "sgd"), ("precision", "float16"),
        ("schedule", "linear"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .*{value}"):
        TrainConfig(**{field: value})


def test_the_published_recipe_is_the_homeworks():
    assert (PUBLISHED.optimizer, PUBLISHED.learning_rate, PUBLISHED.batch_size) == ("adam", 3e-3, 32)
    assert (PUBLISHED.steps, PUBLISHED.beta1, PUBLISHED.beta2, PUBLISHED.clip_norm) == (3000, 0.9, 0.999, None)


# --- resuming

SAME = dict(stop_loss=None, batch_size=3, warmup_steps=4, schedule="cosine", steps=8, weight_decay=0.1)


def resumable(optimizer, precision, folder=None):
    """With dropout, so that the random state counts, and windows that do not divide an epoch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL, dropout=0.2))
    return Trainer(model, Rows(), TrainConfig(optimizer=optimizer, precision=precision, **SAME), folder=folder)


COMBINATIONS = [(optimizer, precision) for optimizer in ("adam", "adamw") for precision in ("float32", "bfloat16")]
RESUME = f"""
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.test_training import COMBINATIONS, resumable
for optimizer, precision in COMBINATIONS:
    folder = f"{{sys.argv[1]}}/{{optimizer}}-{{precision}}"
    torch.manual_seed(99)
    torch.rand(5)
    trainer = resumable(optimizer, precision)
    trainer.resume(folder + "/half.pt")
    for _ in range(4):
        trainer.step()
    trainer.save(folder + "/resumed.pt")
"""


def test_training_resumed_in_a_new_process_is_the_same_to_the_bit(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process
    for optimizer, precision in COMBINATIONS:
        folder = tmp_path / f"{optimizer}-{precision}"
        folder.mkdir()
        ours = resumable(optimizer, precision)
        for step in range(8):
            if step == 4:
                ours.save(folder / "half.pt")
            ours.step()
        ours.save(folder / "whole.pt")
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, timeout=300)
    for folder in tmp_path.iterdir():
        whole, resumed, half = (checkpoint.load(folder / f"{name}.pt") for name in ("whole", "resumed", "half"))
        assert identical(whole, resumed), folder.name
        assert not identical(whole, half)


def identical(left, right) -> bool:
    """Nested containers of tensors and plain values, equal to the bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_resumed_training_writes_the_metrics_of_one_that_never_stopped(tmp_path):
    config = replace(PLAIN, steps=8, eval_interval=2, save_interval=4)
    trainer(config, folder=tmp_path / "whole").train()
    first = trainer(config, folder=tmp_path / "parts", objective=failing_at(7, math.nan))
    with pytest.raises(Diverged):
        first.train()  # after writing metrics past the checkpoint of step 4
    second = trainer(config, folder=tmp_path / "parts")
    second.resume(tmp_path / "parts" / "checkpoint.pt")
    second.train()

    def records(name):
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in found]

    assert records("parts") == records("whole")


def test_a_finished_training_resumed_does_nothing_more(tmp_path):
    ours = trainer(folder=tmp_path)
    ours.train()
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = trainer(folder=tmp_path)
    again.resume(tmp_path / "checkpoint.pt")
    again.train()
    assert again.steps_done == 6 and (tmp_path / "metrics.jsonl").read_text() == lines
    assert_equal(weights(ours), weights(again))


def test_a_checkpoint_that_is_not_of_this_training_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    with pytest.raises(checkpoint.CheckpointError, match=r"norm.weight has shape \[8\].*\[4\]"):
        trainer(n_embd=4).resume(path)
    with pytest.raises(ValueError, match=r"7 examples.* 2"):
        trainer(data=Rows((3, 4))).resume(path)
    checkpoint.save(path, model={})
    with pytest.raises(checkpoint.CheckpointError, match="no state of a trainer"):
        trainer().resume(path)
