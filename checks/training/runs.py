"""Training runs that checks observe, with the subject's trainer or ours, and what one step should have done.

Examples are lists of token ids of different lengths; every run knows which examples each step was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ...transformer import distributed
from ...transformer.trainer import TrainConfig, Trainer
from ..expect import NotApplicable
from ..loss.formula import cross_entropy
from ..probes.precision import precision
from ..subject import Subject, cast
from ..watch.draws import states
from ..watch.dropout import set_rates

Example = list[int]
NO_TRAINER = "no trainer was found in your file"
PLAIN: dict[str, Any] = dict(
    warmup_steps=0, clip_norm=None, stop_loss=None, learning_rate=0.1, schedule="constant", steps=1000
)


@dataclass(frozen=True)
class Padded:
    """A batch of examples, padded on the right; all fields [B, T], `mask` and `loss_mask` True for real tokens."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    padded: bool = True

    @property
    def loss_mask(self) -> Tensor:
        return self.mask

    def to(self, device: Any) -> Padded:
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device), mask=self.mask.to(device))


def needs_trainer(subject: Subject) -> None:
    """Raises NotApplicable if the subject has no trainer of its own, before anything is built."""
    if not subject.brings("trainer"):
        raise NotApplicable(NO_TRAINER, unless="--with trainer=FILE.py:NAME")


def side_by_side(examples: Sequence[Example], pad: int = 0) -> Padded:
    longest = max(map(len, examples))
    rows = torch.tensor([[*example, *[pad] * (longest - len(example))] for example in examples])
    lengths = torch.tensor([[len(example) - 1] for example in examples])
    return Padded(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.arange(longest - 1) < lengths)


class Watched:
    """Data for a trainer that records which examples were asked for."""

    def __init__(self, train: Sequence[Example], validation: Sequence[Example] = ()) -> None:
        self.train, self.validation = list(train), list(validation)
        self.given: list[Example] = []

    def batch(self, examples: Sequence[Example]) -> Padded:
        self.given += examples
        return side_by_side(examples)


def examples(
    subject: Subject, count: int, *, seed: int = 0, ragged: bool = True, longest: int | None = None
) -> list[Example]:
    """Random token ids; ragged examples have from 2 tokens up to one more than the model reads at once."""
    most = min(longest or 11, subject.sizes.block_size)
    generator = torch.Generator().manual_seed(1000 * subject.seed + seed)
    lengths = [2 + (3 * i + seed) % (most - 1) if ragged else most + 1 for i in range(count)]
    V = subject.sizes.vocab_size
    rows: list[Example] = [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]
    return rows


def model_of(subject: Subject, *, seed: int = 0, **sizes: Any) -> nn.Module:
    """A small model in train mode, in float64 if it runs in that, without dropout unless asked for."""
    if subject.can_vary("n_layer"):
        sizes.setdefault("n_layer", 1)
    dtype = precision(subject).dtype
    if dtype != torch.float64 and subject.brings("trainer"):
        raise NotApplicable(f"trainers are judged in float64, but the model only runs in {precision(subject)}")
    model = cast(subject.build(seed=seed, **sizes), dtype).train()
    if "dropout" not in sizes:
        set_rates(model, 0.0)
        refuse_chance(subject, model)
    return model


def refuse_chance(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable if training is random even without dropout: skipped blocks, noisy routers.

    Two passes with different random numbers cannot be compared, and reseeding would interfere with the trainer.
    """
    before = states()
    subject.logits(model, subject.tokens(1, 2, seed=subject.seed, vocab_size=2))
    if drawn := [name for name, state in states().items() if state != before[name]]:
        raise NotApplicable("training draws random numbers even with all dropout rates at 0", generators=drawn)


def objective_of(subject: Subject) -> Any:
    """The loss sum of a batch and its number of targets, by the formula; right padding needs no mask."""

    def objective(model: nn.Module, batch: Padded) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(subject.logits(model, batch.tokens), batch.targets)
        return torch.where(batch.loss_mask, losses, 0.0).sum(), batch.loss_mask.sum()

    return objective


@dataclass
class Step:
    """The examples of one optimizer step, and what it did."""

    examples: list[Example]
    loss: float | None  # as reported by the step
    before: Tensor  # all parameters in one vector
    after: Tensor

    @property
    def update(self) -> Tensor:
        return self.after - self.before


class TrainerRun:
    """The subject's `Trainer(model, data, config, objective)`; with `own`, ours if it has none."""

    def __init__(
        self,
        subject: Subject,
        model: nn.Module,
        train: Sequence[Example],
        *,
        validation: Sequence[Example] = (),
        objective: Any = None,
        sgd: bool = True,
        own: bool = False,
        **config: Any,
    ) -> None:
        kind: Any = subject.part("trainer") or (Trainer if own else None)
        if kind is None:
            raise NotApplicable(NO_TRAINER, unless="--with trainer=FILE.py:NAME")
        self.model, self.data = model, Watched(train, validation)
        self.config = TrainConfig(**{**PLAIN, "device": str(subject.device), **config})
        try:
            self.trainer = kind(model, self.data, self.config, objective or objective_of(subject))
        except TypeError as error:
            raise NotApplicable(
                "your trainer cannot be created as Trainer(model, data, config, objective)", error=str(error)
            ) from None
        for name in ("step", "optimizer"):
            if not hasattr(self.trainer, name):
                raise NotApplicable(f"your trainer has no {name}")
        if sgd:
            groups = [{"params": group["params"]} for group in self.trainer.optimizer.param_groups]
            self.trainer.optimizer = torch.optim.SGD(groups, lr=self.config.learning_rate)

    def step(self) -> Step:
        self.data.given.clear()
        before = flat(self.model)
        loss = self.trainer.step()
        return Step(list(self.data.given), None if loss is None else float(loss), before, flat(self.model))


def step_of_rank(subject: Subject, rank: int) -> Tensor:
    """The weights after one step of the process with this rank, which here trains alone on all examples."""

    class Alone(distributed.SingleProcess):
        pass

    Alone.rank = rank
    with patch.object(distributed, "processes", Alone):
        run = TrainerRun(subject, model_of(subject, dropout=0.3), examples(subject, 4, longest=6), batch_size=4)
        if getattr(getattr(run.trainer, "processes", None), "rank", None) != rank:
            raise NotApplicable("your trainer does not distinguish processes by rank")
        run.step()
    return flat(run.model)


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters of a model, in one vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def write(model: nn.Module, weights: Tensor) -> None:
    """Sets all parameters to a vector from `flat`."""
    with torch.no_grad():
        for p, piece in zip(model.parameters(), parts(model, weights), strict=True):
            p.copy_(piece.view_as(p))


def parts(model: nn.Module, vector: Tensor) -> Sequence[Tensor]:
    """The parts of a flat vector that belong to each parameter, in order."""
    return torch.split(vector, [p.numel() for p in model.parameters()])


def pieces(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """The parts of a flat vector by the name of the parameter."""
    return dict(zip([name for name, _ in model.named_parameters()], parts(model, vector), strict=True))


@dataclass
class Losses:
    """The right losses and gradients at a model's current weights, from examples one at a time and unpadded."""

    subject: Subject
    model: nn.Module

    def of(self, example: Example) -> tuple[Tensor, float, int]:
        """Gradient of the loss sum, loss sum, and number of targets of one example."""
        ids = torch.tensor([example], device=self.subject.device)
        logits, targets = self.subject.logits(self.model, ids[:, :-1]), ids[:, 1:]
        total = cross_entropy(logits, targets).sum()
        return self.gradient(total), total.item(), targets.numel()

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient of a scalar with respect to all parameters, in one vector; 0 for frozen ones."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value, trained, allow_unused=True, retain_graph=True)
        found = {id(p): g for p, g in zip(trained, gradients, strict=True) if g is not None}
        return torch.cat([found.get(id(p), torch.zeros(p.numel())).flatten().double() for p in self.model.parameters()])

    def sums(self, given: Iterable[Example]) -> tuple[Tensor, float, int]:
        gradient, total, count = torch.zeros(sum(p.numel() for p in self.model.parameters())).double(), 0.0, 0
        for example in given:
            g, value, n = self.of(example)
            gradient, total, count = gradient + g, total + value, count + n
        return gradient, total, count

    def mean(self, given: Iterable[Example]) -> tuple[Tensor, float]:
        """Gradient and value of the mean loss over all targets of the examples."""
        gradient, total, count = self.sums(given)
        return gradient / max(count, 1), total / max(count, 1)


# What a train_step calls: backward, optimizer.step and scheduler.step, in order


@dataclass
class Events:
    """The names of the calls, and the gradients at each optimizer step."""

    names: list[str] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return " → ".join(self.names)


class Ticks(torch.optim.lr_scheduler.LambdaLR):
    """A constant schedule that records when it is stepped."""

    def __init__(self, optimizer: torch.optim.Optimizer, events: Events) -> None:
        self.events = Events()
        super().__init__(optimizer, lambda _: 1.0)
        self.events = events  # not the step that the constructor makes itself

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.events.names.append("scheduler.step")
        super().step(*args, **kwargs)


@contextmanager
def watched_events(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Events]:
    """Records the calls of this optimizer and of Tensor.backward inside the block."""
    events = Events()
    backward: Any = torch.Tensor.backward

    def stepped(*_: Any) -> None:
        events.names.append("optimizer.step")
        given = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        events.gradients.append(torch.cat(given).clone() if given else torch.zeros(0))

    def backed(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        events.names.append("backward")
        return backward(tensor, *args, **kwargs)

    hook = optimizer.register_step_pre_hook(stepped)
    try:
        with patch.object(torch.Tensor, "backward", backed):
            yield events
    finally:
        hook.remove()
