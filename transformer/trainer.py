"""Training: Trainer does what a TrainConfig says, one optimizer step after another.

Each idea of a step (mode, zero_grad, accumulation, normalisation, clipping, rate, tick) is one small method.
Not here: the loss (loss.py), the order of the data (data.py), files (checkpoint.py, metrics.py), several processes
(distributed.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpoint, distributed, random_state
from .data import Batch, DataOrder
from .loss import loss_sum
from .metrics import Metrics, numbers, peak_memory
from .model import ModelConfig
from .optimizer import build_optimizer
from .terminal import Interruption, Progress
from .train_config import PUBLISHED, TrainConfig

__all__ = ["PUBLISHED", "Data", "Diverged", "TrainConfig", "Trainer", "next_token_objective"]

CHECKPOINT = "checkpoint.pt"


class Data(Protocol):
    """What a trainer trains on: examples, and how some of them become a batch.

    A `tokenizer` with `to_dict()`, where there is one, goes into the checkpoints.
    """

    @property
    def train(self) -> Sequence[Any]: ...

    @property
    def validation(self) -> Sequence[Any]: ...

    def batch(self, examples: Sequence[Any], /) -> Batch: ...


Objective = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # of a batch: the sum of its losses, its count of targets


def next_token_objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch.tokens, batch.mask if batch.padded else None)
    return loss_sum(logits, batch.targets, batch.loss_mask)


class Diverged(FloatingPointError):
    """A loss or a weight is not finite."""


class Trainer:
    """Trains `model` on `data.train` by what `objective` says of a batch: the sum of its losses, its count of targets.

    `step` makes one optimizer step. `train` makes all of them and, with a `folder`, writes metrics.jsonl and
    checkpoint.pt there. The caller's random state is never touched. Raises ValueError for a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainConfig,
        objective: Objective = next_token_objective,
        *,
        folder: str | Path | None = None,
    ) -> None:
        self.data, self.config, self.objective = data, config, objective
        self.device = usable_device(config.device)
        self.processes = distributed.processes()
        self.model = model.to(self.device)
        self.network = self.processes.wrap(self.model)  # the same, for training
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, config)
        self.order = DataOrder(len(data.train), config.seed)
        self.random = random_state.seeded(config.seed + self.processes.rank, self.device)
        self.folder = None if folder is None else Path(folder)
        self.metrics = Metrics(self.metrics_path())
        self.gradient_norm: Tensor | None = None  # before clipping
        self.steps_done = 0
        self.seconds = 0.0  # spent in `train`
        self.loss = math.inf  # the last one read
        self.validated = self.saved = -1  # the steps done then

    def metrics_path(self) -> Path | None:
        if self.processes.rank > 0:
            return Path(os.devnull)  # the first process writes for all
        return None if self.folder is None else self.folder / "metrics.jsonl"

    # one step

    def step(self) -> Tensor:
        """One optimizer step on the next window of examples; the mean loss of its targets, before the step."""
        with self.own_random_state():
            self.train_mode()
            self.zero_grad()
            total, count = self.accumulate(self.window())
            self.normalise(count)
            self.clip()
            self.set_learning_rate()
            self.optimizer.step()
            self.tick()
        return total / count

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """Dropout draws from a state of the trainer's own: no sampling between two steps disturbs it."""
        with random_state.preserved(self.device):
            random_state.restore(self.random, self.device)
            try:
                yield
            finally:
                self.random = random_state.current(self.device)

    def train_mode(self) -> None:
        if not self.network.training:
            self.network.train()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def window(self) -> list[Any]:
        """The examples of one step."""
        return [self.data.train[i] for i in self.order.window(self.config.batch_size)]

    def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of the window's losses; their sum and the count of targets (at least 1)."""
        mine, weight = self.processes.share(examples)
        *others, last = self.micro_batches(mine)
        with self.processes.without_averaging(self.network):
            sums = [self.backward(part, weight) for part in others]
        sums.append(self.backward(last, weight))
        total, count = self.processes.sum(*(torch.stack(values).sum() for values in zip(*sums, strict=True)))
        return total, count.clamp(min=1)

    def micro_batches(self, examples: Sequence[Any]) -> list[Sequence[Any]]:
        size = self.config.micro_batch_size or len(examples)
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
        total, count = self.compute(self.network, examples)
        total = total * weight
        total.backward()  # type: ignore[no-untyped-call]
        return total.detach(), count * weight

    def compute(self, model: nn.Module, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        batch = self.data.batch(examples).to(self.device)
        with self.autocast():
            return self.objective(model, batch)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def normalise(self, count: Tensor) -> None:
        """From the gradient of the sum to that of the mean over the whole window, however it was shared and split."""
        share = count / self.processes.count  # averaging has divided by the processes already
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(share)  # not times its inverse, which would be rounded to float32

    def clip(self) -> None:
        if self.config.clip_norm is not None:
            self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)

    def set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps_done)

    def learning_rate(self, done: int) -> float:
        """Of the step that follows `done` others."""
        c = self.config
        if done < c.warmup_steps:
            return c.learning_rate * (done + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.learning_rate
        fraction = (done - c.warmup_steps) / max(1, c.steps - 1 - c.warmup_steps)
        return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * (1 + math.cos(math.pi * fraction)) / 2

    def tick(self) -> None:
        self.steps_done += 1

    # evaluation

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Any]) -> float:
        """Mean loss over all targets of the examples, in eval mode. Mode, weights and random state stay as they are."""
        if not examples:
            raise ValueError("there are no examples to evaluate")
        mine, weight = self.processes.share(examples)
        size = self.config.micro_batch_size or self.config.batch_size
        with random_state.preserved(self.device), self.eval_mode():
            sums = [self.compute(self.model, mine[i : i + size]) for i in range(0, len(mine), size)]
        total, count = self.processes.sum(*(weight * torch.stack(values).sum() for values in zip(*sums, strict=True)))
        return (total / count.clamp(min=1)).item()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Every module gets its own mode back: some may be frozen in eval mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    # many steps

    def train(self) -> None:
        """Steps until a loss of at most `stop_loss`, or until `steps` are done; then evaluates and saves.

        Ctrl-C lets the step end, saves, and raises KeyboardInterrupt. Raises Diverged when a loss or a weight is not
        finite, ProcessLost when another process of the training has ended; the last checkpoint remains in both cases.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.metrics.writing(self.steps_done), self.noticing_lost_processes():
            interrupted = self.take_steps()
        if interrupted:
            raise KeyboardInterrupt

    def take_steps(self) -> bool:
        """Whether Ctrl-C ended them."""
        begun = time.perf_counter() - self.seconds
        interrupted = False
        if self.steps_done == 0 and self.config.eval_interval:
            self.validate()
        with Interruption() as interruption, Progress(self.config.steps) as progress:
            while not self.finished() and not interrupted:
                self.record(self.step())
                self.seconds = time.perf_counter() - begun
                if self.due(self.config.log_interval):
                    self.read()
                    progress.update(self.steps_done, self.loss)
                    interrupted = self.processes.any(interruption.asked)
                if self.due(self.config.eval_interval):
                    self.validate()
                if self.due(self.config.save_interval):
                    self.save_checkpoint()
            self.read()
            if not interrupted:
                self.validate()
            self.save_checkpoint()
        return interrupted

    def finished(self) -> bool:
        learned = self.config.stop_loss is not None and self.loss <= self.config.stop_loss
        return learned or self.steps_done >= self.config.steps

    def due(self, interval: int) -> bool:
        return interval > 0 and self.steps_done % interval == 0

    def record(self, loss: Tensor) -> None:
        """Of the step just done. Nothing here waits for the device."""
        rate = self.learning_rate(self.steps_done - 1)
        self.metrics.add(step=self.steps_done, loss=loss, learning_rate=rate, gradient_norm=self.gradient_norm)

    def read(self) -> None:
        """Waits for the device, and writes the metrics of the steps since the last reading."""
        for record in self.metrics.read():
            if not math.isfinite(record["loss"]):
                raise Diverged(f"the loss is {record['loss']} at step {record['step']}{self.advice(record['step'])}")
            self.loss = record["loss"]

    def validate(self) -> None:
        if len(self.data.validation) == 0 or self.validated == self.steps_done:
            return
        self.read()
        loss = self.evaluate(self.data.validation)
        memory = peak_memory(self.device)
        self.metrics.write([dict(step=self.steps_done, validation_loss=loss, seconds=self.seconds, peak_memory=memory)])
        self.validated = self.steps_done

    def advice(self, step: int) -> str:
        rate = self.learning_rate(step - 1)
        return (
            f" (learning rate {rate:.3g}); {self.last_checkpoint()}. "
            "Try a lower learning_rate, a longer warm-up (warmup_steps) or clipping (clip_norm)"
        )

    def last_checkpoint(self) -> str:
        if self.folder is None or self.saved < 0:
            return "no checkpoint has been saved"
        return f"{self.folder / CHECKPOINT} holds step {self.saved}"

    @contextmanager
    def noticing_lost_processes(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.processes.count == 1 or not distributed.lost_another_process(error):
                raise
            distributed.finish_by_itself()
            who = f"process {self.processes.rank} of {self.processes.count}"
            raise distributed.ProcessLost(
                f"{who} stops at step {self.steps_done + 1}: another has ended. {self.last_checkpoint()}. {error}"
            ) from error

    # to a checkpoint and back

    def save_checkpoint(self) -> None:
        """Into the folder, if there is one; what is not finite never replaces what is."""
        if self.folder is None or self.saved == self.steps_done:
            return
        self.read()
        if not all(numbers([parameter.isfinite().all() for parameter in self.model.parameters()])):
            raise Diverged(f"a weight is not finite after step {self.steps_done}{self.advice(self.steps_done)}")
        self.save(self.folder / CHECKPOINT)
        self.saved = self.steps_done

    def save(self, path: str | Path) -> None:
        """Everything needed to go on from here, or to load the model. Raises CheckpointError."""
        config = getattr(self.model, "config", None)
        tokenizer: Any = getattr(self.data, "tokenizer", None)
        state = dict(
            model=self.model.state_dict(),
            config=asdict(config) if isinstance(config, ModelConfig) else None,
            tokenizer=tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else None,
            training=asdict(self.config),
            trainer=self.state_dict(),
        )
        if self.processes.rank == 0:
            checkpoint.save(path, **state)

    def resume(self, path: str | Path) -> None:
        """Goes on where the training that saved `path` was, as if it had never stopped. Raises CheckpointError."""
        state = checkpoint.load(path)
        if state.get("trainer") is None:
            raise checkpoint.CheckpointError(f"{path} holds no state of a trainer to resume from")
        checkpoint.load_weights(self.model, state["model"])
        self.load_state_dict(state["trainer"])
        self.saved = self.steps_done

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "loss": self.loss,
            "seconds": self.seconds,
            "validated": self.validated,
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.state_dict(),
            "random": self.processes.gather(self.random),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A process beyond those that saved keeps the random state that the seed gave it."""
        self.order.load_state_dict(state["order"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("steps_done", "loss", "seconds", "validated"):
            setattr(self, name, state[name])
        if self.processes.rank < len(state["random"]):
            self.random = state["random"][self.processes.rank]


def usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used by torch {torch.__version__}: {reason}") from None
