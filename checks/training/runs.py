"""Trainings that checks watch: a subject's trainer, or our own over its model; and what one step should have done.

Examples are lists of token ids, each of a length of its own; every run knows which examples each step was given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.trainer import TrainConfig, Trainer
from ..expect import NotApplicable
from ..loss.formula import cross_entropy
from ..probes.precision import precision
from ..subject import Subject, cast
from ..watch.draws import states
from ..watch.dropout import set_rates

Example = list[int]
PLAIN = dict(warmup_steps=0, clip_norm=None, stop_loss=None, learning_rate=0.1, schedule="constant", steps=1000)


@dataclass(frozen=True)
class Padded:
    """Examples side by side, padded at the right; all fields [B, T], `mask` and `loss_mask` True where real."""

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
    """Raises NotApplicable where the subject has no trainer of its own, before anything is built."""
    if not subject.brings("trainer"):
        raise NotApplicable("the subject brings no trainer")


def side_by_side(examples: Sequence[Example], pad: int = 0) -> Padded:
    longest = max(map(len, examples))
    rows = torch.tensor([[*example, *[pad] * (longest - len(example))] for example in examples])
    lengths = torch.tensor([[len(example) - 1] for example in examples])
    return Padded(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.arange(longest - 1) < lengths)


class Watched:
    """Data for a trainer, which remembers what it was asked for."""

    def __init__(self, train: Sequence[Example], validation: Sequence[Example] = ()) -> None:
        self.train, self.validation = list(train), list(validation)
        self.given: list[Example] = []

    def batch(self, examples: Sequence[Example]) -> Padded:
        self.given += examples
        return side_by_side(examples)


def examples(
    subject: Subject, count: int, *, seed: int = 0, ragged: bool = True, longest: int | None = None
) -> list[Example]:
    """Random token ids; ragged ones have from 2 tokens to as many as the model reads, and one."""
    most = min(longest or 11, subject.sizes.block_size)
    generator = torch.Generator().manual_seed(1000 * subject.seed + seed)
    lengths = [2 + (3 * i + seed) % (most - 1) if ragged else most + 1 for i in range(count)]
    V = subject.sizes.vocab_size
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


def model_of(subject: Subject, *, seed: int = 0, **sizes: Any) -> nn.Module:
    """A small model in train mode, in float64 where it runs in that, without dropout unless it is asked for."""
    if subject.can_vary("n_layer"):
        sizes.setdefault("n_layer", 1)
    dtype = precision(subject).dtype
    if dtype != torch.float64 and subject.brings("trainer"):
        raise NotApplicable(f"a trainer is judged in float64, and the model runs in {precision(subject)}")
    model = cast(subject.build(seed=seed, **sizes), dtype).train()
    if "dropout" not in sizes:
        set_rates(model, 0.0)
        refuse_chance(subject, model)
    return model


def refuse_chance(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable where training is random with no dropout left: blocks are skipped, routers are noisy.

    Two passes that draw differently cannot be compared, and reseeding both would undo what a trainer does.
    """
    before = states()
    subject.logits(model, subject.tokens(1, 2, seed=subject.seed, vocab_size=2))
    if drawn := [name for name, state in states().items() if state != before[name]]:
        raise NotApplicable("training draws random numbers that no dropout rate stops", generators=drawn)


def objective_of(subject: Subject) -> Any:
    """The sum of the losses of a batch and its count of targets, by the formula; right padding needs no mask."""

    def objective(model: nn.Module, batch: Padded) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(subject.logits(model, batch.tokens), batch.targets)
        return torch.where(batch.loss_mask, losses, 0.0).sum(), batch.loss_mask.sum()

    return objective


@dataclass
class Step:
    """What one optimizer step was given and what it did."""

    examples: list[Example]
    loss: float | None  # as reported
    before: Tensor  # all parameters, flat
    after: Tensor

    @property
    def update(self) -> Tensor:
        return self.after - self.before


class TrainerRun:
    """A `Trainer(model, data, config, objective)` of the subject's; with `own`, ours where it brings none."""

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
            raise NotApplicable("the subject brings no trainer")
        self.model, self.data = model, Watched(train, validation)
        self.config = TrainConfig(**{**PLAIN, "device": str(subject.device), **config})
        try:
            self.trainer = kind(model, self.data, self.config, objective or objective_of(subject))
        except TypeError as error:
            raise NotApplicable(
                "the trainer is not made as Trainer(model, data, config, objective)", error=str(error)
            ) from None
        for name in ("step", "optimizer"):
            if not hasattr(self.trainer, name):
                raise NotApplicable(f"the trainer has no {name}")
        if sgd:
            groups = [{"params": group["params"]} for group in self.trainer.optimizer.param_groups]
            self.trainer.optimizer = torch.optim.SGD(groups, lr=self.config.learning_rate)

    def step(self) -> Step:
        self.data.given.clear()
        before = flat(self.model)
        loss = self.trainer.step()
        return Step(list(self.data.given), None if loss is None else float(loss), before, flat(self.model))


def flat(model: nn.Module) -> Tensor:
    """All parameters of a model in one vector, a copy."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def write(model: nn.Module, weights: Tensor) -> None:
    """Puts all parameters back to what `flat` gave."""
    with torch.no_grad():
        for p, piece in zip(model.parameters(), weights.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(piece.view_as(p))


def pieces(model: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """A flat vector by the names of the parameters it belongs to."""
    named = list(model.named_parameters())
    return dict(zip([name for name, _ in named], vector.split([p.numel() for _, p in named]), strict=True))


@dataclass
class Losses:
    """The gradients and values that examples should give, one at a time and unpadded, at a model's weights now."""

    subject: Subject
    model: nn.Module

    def of(self, example: Example) -> tuple[Tensor, float, int]:
        """Gradient of the sum, sum, and number of targets of one example."""
        ids = torch.tensor([example], device=self.subject.device)
        logits, targets = self.subject.logits(self.model, ids[:, :-1]), ids[:, 1:]
        total = cross_entropy(logits, targets).sum()
        return self.gradient(total), total.item(), targets.numel()

    def gradient(self, value: Tensor) -> Tensor:
        """Of a scalar, with respect to all parameters, flat; 0 for frozen ones."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        found = dict(
            zip(
                map(id, trained), torch.autograd.grad(value, trained, allow_unused=True, retain_graph=True), strict=True
            )
        )
        pieces = [found.get(id(p)) for p in self.model.parameters()]
        sizes = [p.numel() for p in self.model.parameters()]
        return torch.cat(
            [torch.zeros(n).double() if g is None else g.flatten().double() for g, n in zip(pieces, sizes, strict=True)]
        )

    def sums(self, given: Iterable[Example]) -> tuple[Tensor, float, int]:
        gradient, total, count = torch.zeros(sum(p.numel() for p in self.model.parameters())).double(), 0.0, 0
        for example in given:
            g, value, n = self.of(example)
            gradient, total, count = gradient + g, total + value, count + n
        return gradient, total, count

    def mean(self, given: Iterable[Example]) -> tuple[Tensor, float]:
        """Gradient and value of the mean over all targets of the examples."""
        gradient, total, count = self.sums(given)
        return gradient / max(count, 1), total / max(count, 1)
