"""Checkpoints: a resumed training continues exactly, saving has no side effects, and bad files are refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .expect import NotApplicable, fail, needs, slow
from .subject import Subject
from .training.runs import Step, TrainerRun, examples, flat, model_of, needs_trainer
from .watch.draws import seeded

RESUMES = "check_checkpoint.check_a_resumed_training_goes_on_bit_for_bit"
HALF = 4  # steps before and after the checkpoint; with 7 examples and 3 per step, it is saved during an epoch


@needs("check_training.check_a_step_follows_the_gradient")
def check_a_resumed_training_goes_on_bit_for_bit(subject: Subject) -> None:
    """Training must continue exactly after a save and a load into a new trainer: the same weights, bit for bit."""
    with folder() as path:
        first = Training(subject, dropout=0.3)
        first.go(HALF)
        first.save(path)
        whole = first.go(HALF)
        second = Training(subject, dropout=0.3, other=True)
        second.resume(path)
        resumed = second.go(HALF)
    if torch.equal(whole.weights, resumed.weights) and whole.rates == resumed.rates:
        return
    largest = float((whole.weights - resumed.weights).abs().max())
    says, likely = parting(subject, whole, resumed)
    fail(
        f"{HALF} steps after resuming, the weights differ by {largest:.3g} from those of the uninterrupted training: "
        f"{says}",
        likely=likely,
        advice="Save and load the step count, optimizer, data order and random states together with the weights.",
        difference=largest,
        rates=[whole.rates, resumed.rates],
    )


def parting(subject: Subject, whole: Stretch, resumed: Stretch) -> tuple[str, tuple[str, ...]]:
    """What the checkpoint lost, found from the first difference."""
    if not torch.equal(whole.steps[0].before, resumed.steps[0].before):
        return "the weights are not the ones that were saved", ("checkpoint-aliases-live-weights",)
    if whole.rates != resumed.rates:
        at = next(i for i, (a, b) in enumerate(zip(whole.rates, resumed.rates, strict=True)) if a != b)
        return (
            f"the learning rate of step {HALF + at + 1} is {resumed.rates[at]:.4g}, expected {whole.rates[at]:.4g}: "
            "the schedule starts again",
            ("checkpoint-without-step",),
        )
    for number, (a, b) in enumerate(zip(whole.steps, resumed.steps, strict=True), start=HALF + 1):
        if a.examples != b.examples:
            return (
                f"step {number} uses other examples: the order of the data starts again",
                ("resume-replays-data-order",),
            )
    if whole.steps[0].loss != resumed.steps[0].loss:
        return "the first loss differs although weights and examples are the same: dropout draws other numbers", (
            "checkpoint-without-rng",
        )
    return "the first update differs although the gradient is the same: the optimizer has lost its moment estimates", (
        "checkpoint-without-optimizer",
    )


@slow("two new processes")
@needs(RESUMES)
def check_a_new_process_resumes_bit_for_bit(subject: Subject) -> None:
    """Training resumed in a new process must give the same weights, bit for bit, as training that was not stopped."""
    if subject.name != "transformer" and not subject.name.startswith("bug:"):
        raise NotApplicable("a new process cannot load this trainer")
    with folder() as path:
        whole = in_new_process(subject, path, "training.go(N); training.save(path); training.go(N)")
        resumed = in_new_process(subject, path, "training.resume(path); training.go(N)", other=True)
    if torch.equal(whole, resumed):
        return
    apart = float((whole - resumed).abs().max())
    fail(
        f"{HALF} steps after resuming in a new process, the weights differ by {apart:.3g} from those of the "
        "uninterrupted training",
        likely=("checkpoint-without-rng", "checkpoint-without-step", "checkpoint-without-optimizer"),
        advice="Save the step count, optimizer, data order and random states: a new process starts each of them anew.",
    )


def in_new_process(subject: Subject, path: Path, does: str, *, other: bool = False) -> Tensor:
    """The weights at the end of a training in a new Python process, on one thread.

    On several threads, the order of a sum may depend on the load of the machine.
    """
    end = path.with_name("end.pt")
    code = f"""
from {__name__} import HALF as N, Training, flat, torch
from {__package__}.run.subjects import subject_of
torch.set_num_threads(1)
path = {str(path)!r}
training = Training(subject_of({subject.name!r}, seed={subject.seed}), dropout=0.3, other={other})
{does}
torch.save(flat(training.run.model), {str(end)!r})
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the new process failed"])[-1])
    weights: Tensor = torch.load(end, weights_only=True)
    return weights


@needs(RESUMES)
def check_a_checkpoint_is_a_snapshot(subject: Subject) -> None:
    """A saved checkpoint must not change when training continues."""
    with folder() as path:
        training = Training(subject)
        training.go(1)
        saved = flat(training.run.model)
        training.save(path)
        training.go(2)
        other = Training(subject, other=True)
        other.resume(path)
        found = flat(other.run.model)
    if not torch.equal(found, saved):
        moved = torch.equal(found, flat(training.run.model))
        fail(
            f"the checkpoint changes by {float((found - saved).abs().max()):.3g} within 2 steps after it was saved"
            + (": it holds the live weights, not a copy" if moved else ""),
            likely=("checkpoint-aliases-live-weights",),
            advice="Clone or write the weights at once: state_dict() refers to the live tensors.",
        )


@needs(RESUMES)
def check_saving_changes_nothing(subject: Subject) -> None:
    """Saving must not change the training: the weights must be bit for bit the same with and without it."""
    ends = []
    for saves in (False, True):
        with folder() as path, seeded(5):
            training = Training(subject, dropout=0.3)
            training.go(1)
            if saves:
                training.save(path)
            ends.append(training.go(2).weights)
    if not torch.equal(*ends):
        fail(
            "saving changes the training: two steps later the weights differ by "
            f"{float((ends[0] - ends[1]).abs().max()):.3g} from those of a training that did not save",
            likely=("saving-draws",),
            advice="Save without drawing random numbers, changing the mode or dtype, or making a step.",
        )


def check_other_weights_are_refused(subject: Subject) -> None:
    """Loading weights with a missing, unknown or wrongly shaped tensor must raise an error and change nothing."""
    load: Callable[[nn.Module, dict[str, Tensor]], Any] = subject.part("load_weights") or load_plainly
    for name, damage in DAMAGES.items():
        model = model_of(subject)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        plain = {key: value for key, value in state.items() if key not in adapted(model)}
        if not any(value.dim() == 2 for value in plain.values()):
            raise NotApplicable("the model overrides how its weights are loaded")
        with torch.no_grad():
            damaged = damage({key: value + 1 if value.is_floating_point() else value for key, value in plain.items()})
        try:
            load(model, {**damaged, **{key: value for key, value in state.items() if key not in plain}})
        except Exception:
            if load is not load_plainly and not holds(model, state):
                fail(
                    f"weights with {name} are refused only after some tensors were copied",
                    likely=("load-half-way",),
                    advice="Compare all names and shapes before copying the first tensor.",
                )
            continue
        changed = "nothing is copied" if holds(model, state) else "the rest is copied"
        fail(
            f"weights with {name} are loaded without an error ({changed}): a checkpoint of another model is accepted",
            likely=("load-not-strict",),
            advice="Call load_state_dict(weights, strict=True), which is the default.",
            damage=name,
        )


def holds(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the model still has these weights."""
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def load_plainly(model: nn.Module, weights: dict[str, Tensor]) -> None:
    model.load_state_dict(weights)


def without_one(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key in list(state)[1:] for value in [state[key]]}


def with_one_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "unknown.weight": torch.zeros(2)}


def adapted(model: nn.Module) -> set[str]:
    """Tensors of modules that override loading, such as a position table that is cut to the length needed."""
    own = [
        name
        for name, module in model.named_modules()
        if type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        or module._load_state_dict_pre_hooks
    ]
    return {f"{name}.{key}".lstrip(".") for name in own for key in model.get_submodule(name).state_dict()}


def of_another_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key, value in state.items() if value.dim() == 2)
    return {**state, key: state[key][:-1]}


DAMAGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a tensor missing": without_one,
    "an unknown tensor": with_one_more,
    "a tensor a row too small": of_another_shape,
}


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def check_a_file_with_code_is_not_run(subject: Subject) -> None:
    """Loading a checkpoint that contains code must raise an error and must not run the code."""
    load = subject.part("load")
    if load is None:
        raise NotApplicable("no function load was found in your file")
    with folder() as path:
        mark = path.with_name("ran")
        writers: dict[str, Callable[[Any], Any]] = {
            "a checkpoint": lambda state: torch.save(state, path),
            "a plain pickle": lambda state: path.write_bytes(pickle.dumps(state)),
        }
        for name, write in writers.items():
            write({"model": {"weight": torch.zeros(2)}, "trap": Trap(mark)})
            refused = ""
            try:
                load(path)
            except Exception as error:
                refused = type(error).__name__
            if mark.exists() or not refused:
                fail(
                    f"{name} that contains code is loaded"
                    + (", and the code runs" if mark.exists() else " without an error"),
                    likely=("load-runs-code",),
                    advice="Use torch.load(path, weights_only=True).",
                )


# A training run to take checkpoints of


@dataclass
class Stretch:
    """Consecutive steps: their updates, their learning rates, and the weights at the end."""

    steps: list[Step]
    rates: list[float]
    weights: Tensor


class Training:
    """A trainer with everything that a checkpoint must contain; an `other` one starts from a different state."""

    def __init__(self, subject: Subject, *, dropout: float = 0.0, other: bool = False) -> None:
        needs_trainer(subject)
        model = model_of(subject, seed=int(other), dropout=dropout).float()
        self.run = TrainerRun(
            subject, model, examples(subject, 7), sgd=False, batch_size=3, optimizer="adamw", weight_decay=0.1,
            learning_rate=1e-2, warmup_steps=3, schedule="cosine", steps=4 * HALF, clip_norm=1.0,
        )  # fmt: skip
        for name in ("save", "resume"):
            if not hasattr(self.run.trainer, name):
                raise NotApplicable(f"your trainer has no {name}")
        self.other = other

    def go(self, steps: int) -> Stretch:
        done, rates = [], []
        with seeded(11 + self.other):  # a new process would have drawn other numbers
            for _ in range(steps):
                done.append(self.run.step())
                rates.append(self.run.trainer.optimizer.param_groups[0]["lr"])
        return Stretch(done, rates, flat(self.run.model))

    def save(self, path: Path) -> None:
        self.run.trainer.save(path)

    def resume(self, path: Path) -> None:
        self.run.trainer.resume(path)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "checkpoint.pt"
