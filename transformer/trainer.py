"""Training: TrainConfig says how, Trainer does it, one optimizer step after another.

Each idea of a step (mode, zero_grad, accumulation, normalisation, clipping, rate, tick) is one small method.
Not here: what the loss is (loss.py), the order of the data (data.py), files (checkpoint.py, metrics.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from transformer import checkpoint
from transformer.data import Batch, DataOrder
from transformer.distributed import SingleProcess
from transformer.loss import loss_sum
from transformer.metrics import Metrics, peak_memory
from transformer.model import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults are the quick recipe for the sentence."""

    steps: int = 3000  # optimizer steps at most
    stop_loss: float | None = 1e-5  # training ends at a step whose loss is this or less, nats a target; null: never
    batch_size: int = 4  # examples an optimizer step, over all processes
    micro_batch_size: int | None = None  # examples in memory at once, a process; null: all. The gradients are the same
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-2  # after warm-up
    beta1: float = 0.9  # memory of the gradient's mean, in Adam
    beta2: float = 0.95  # memory of the gradient's square, in Adam
    eps: float = 1e-8  # added to the root of the square, in Adam
    weight_decay: float = 0.0  # of matrices; embeddings, norms and biases never decay. AdamW: decoupled, Adam: L2
    warmup_steps: int = 10  # over which the learning rate rises linearly
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate after warm-up, down to its minimum
    min_learning_rate: float = 0.0  # at the last step of the cosine
    clip_norm: float | None = 1.0  # longest gradient, over all parameters, in the 2-norm; null: any
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and optimizer stay float32
    device: str = "cpu"  # cpu, cuda, cuda:1, mps, xpu
    seed: int = 0  # of the data order, dropout and, on the command line, the initial weights
    log_interval: int = 1  # steps between readings of the loss: each waits for the device
    eval_interval: int = 0  # steps between evaluations on the validation split; 0: at the end only
    save_interval: int = 1000  # steps between checkpoints; 0: at the end only

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Data(Protocol):
    """What a trainer trains on: examples, and how some of them become a batch."""

    train: Sequence
    validation: Sequence

    def batch(self, examples: Sequence, /) -> Batch: ...


Objective = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # the sum of the losses of a batch, its count of targets


def next_token_objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch.tokens, batch.mask if batch.padded else None)
    return loss_sum(logits, batch.targets, batch.loss_mask)


class Diverged(FloatingPointError):
    """The loss or a weight is no longer finite."""


class Trainer:
    """Trains `model` on `data.train`, by the sum of losses and the count of targets that `objective` gives.

    With a `folder`, writes metrics.jsonl and checkpoint.pt there.
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
        self.device = torch.device(config.device)
        self.processes = SingleProcess()
        self.model = model.to(self.device)
        self.network = self.processes.wrap(self.model)  # the same, with gradients averaged over the processes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, config)
        self.order = DataOrder(len(data.train), config.seed)
        self.folder = None if folder is None else Path(folder)
        self.metrics = Metrics(self.folder and self.folder / "metrics.jsonl")
        self.steps_done = 0
        self.loss = math.inf  # of the last step that was read
        with preserved_random_state(self.device):
            torch.manual_seed(config.seed)
            self.random = random_state(self.device)

    # one step

    def step(self) -> Tensor:
        """One optimizer step on the next window of examples. The mean loss of its targets, before the step."""
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

    def train_mode(self) -> None:
        if not self.model.training:
            self.model.train()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def window(self) -> list:
        return [self.data.train[i] for i in self.order.window(self.config.batch_size)]

    def accumulate(self, examples: Sequence) -> tuple[Tensor, Tensor]:
        """Adds up the gradients of the window's losses; the sum of these and the count of targets, at least 1."""
        total = count = torch.zeros((), device=self.device)
        for part in self.micro_batches(examples):
            loss, targets = self.compute(part)
            loss.backward()
            total, count = total + loss.detach(), count + targets
        return total, count.clamp(min=1)

    def micro_batches(self, examples: Sequence) -> list[Sequence]:
        size = self.config.micro_batch_size or len(examples)
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def compute(self, examples: Sequence) -> tuple[Tensor, Tensor]:
        batch = self.data.batch(examples).to(self.device)
        with self.autocast():
            return self.objective(self.network, batch)

    def autocast(self) -> AbstractContextManager:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.precision))

    def normalise(self, count: Tensor) -> None:
        """From the gradient of the sum to that of the mean over the whole window, however it was split."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(count)

    def clip(self) -> None:
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)

    def set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps_done)

    def learning_rate(self, step: int) -> float:
        """Of the step after `step` others."""
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.learning_rate
        done = (step - c.warmup_steps) / max(1, c.steps - 1 - c.warmup_steps)
        return c.min_learning_rate + (c.learning_rate - c.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2

    def tick(self) -> None:
        self.steps_done += 1

    # many steps

    def train(self) -> None:
        """Steps until the loss is at most `stop_loss`, or `steps` are done."""
        started = time.perf_counter()
        while self.steps_done < self.config.steps and not self.learned():
            loss = self.step()
            self.loss = loss.item()
            self.metrics.write([{"step": self.steps_done, "loss": self.loss}])
        seconds = time.perf_counter() - started
        self.metrics.write(
            [
                {
                    "step": self.steps_done,
                    "validation_loss": self.evaluate(self.data.validation),
                    "seconds": seconds,
                    "peak_memory": peak_memory(self.device),
                }
            ]
        )
        if self.folder:
            self.save(self.folder / "checkpoint.pt")

    def learned(self) -> bool:
        return self.config.stop_loss is not None and self.loss <= self.config.stop_loss

    @torch.no_grad()
    def evaluate(self, examples: Sequence) -> float:
        """Mean loss over all targets of the examples, in eval mode; model, mode and random state are left as found."""
        sums = torch.zeros(2, dtype=torch.float64)
        with preserved_random_state(self.device), self.eval_mode():
            for i in range(0, len(examples), self.config.batch_size):
                loss, count = self.compute(examples[i : i + self.config.batch_size])
                sums += torch.stack((loss, count)).to(sums)
        return (sums[0] / sums[1].clamp(min=1)).item()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def own_random_state(self) -> Iterator[None]:
        """Dropout draws from a random state of the trainer's own, which nobody else disturbs."""
        with preserved_random_state(self.device):
            set_random_state(self.random, self.device)
            try:
                yield
            finally:
                self.random = random_state(self.device)

    # to a checkpoint and back

    def save(self, path: str | Path) -> None:
        config = getattr(self.model, "config", None)
        tokenizer = getattr(self.data, "tokenizer", None)
        checkpoint.save(
            path,
            model=self.model.state_dict(),
            config=asdict(config) if isinstance(config, ModelConfig) else None,
            tokenizer=tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else None,
            training=asdict(self.config),
            trainer=self.state_dict(),
        )

    def resume(self, path: str | Path) -> None:
        state = checkpoint.load(path)
        checkpoint.load_weights(self.model, state["model"])
        self.load_state_dict(state["trainer"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "loss": self.loss,
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.state_dict(),
            "random": self.random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state["order"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done, self.loss, self.random = state["steps_done"], state["loss"], state["random"]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    groups = decay_groups(model, config.weight_decay)
    fused = torch.device(config.device).type in ("cpu", "cuda")
    return kind(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay. Vectors (norms, biases) do not, nor do embeddings: a rare token would fade between its uses.

    A head tied to the token embedding is that embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.dim() >= 2 and id(p) not in embeddings]
    keeps = [p for p in trained if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": keeps, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


RandomState = dict[str, Tensor]


def random_state(device: torch.device) -> RandomState:
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
