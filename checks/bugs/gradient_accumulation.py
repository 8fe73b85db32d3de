"""Wrong gradient accumulation: micro-batches that are dropped, averaged, or divided by the wrong number."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.trainer import Trainer
from ..check_training import check_a_step_follows_the_gradient, check_micro_batches_add_up_to_the_whole
from . import bug
from .damage import step_with
from .designs import SIZE, parts_with_a_step


class ScaledMicroBatches(Trainer):
    """Scales each micro-batch's loss by a function of its count of targets, and divides by nothing else."""

    def factor(self, count: Tensor) -> Tensor:
        raise NotImplementedError

    def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
        total, count = self.compute(self.network, examples)
        (total * weight * self.factor(count)).backward()  # type: ignore[no-untyped-call]
        return total.detach(), count * weight

    def normalise(self, count: Tensor) -> None:
        pass


@bug(
    "the micro-batches' means are averaged: targets in short micro-batches weigh more",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/huggingface/transformers/issues/34242",
)
def accum_mean_of_means(parts: SimpleNamespace) -> None:
    class MeanOfMeans(ScaledMicroBatches):
        def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
            self.parts = len(self.micro_batches(examples))
            return super().accumulate(examples)

        def factor(self, count: Tensor) -> Tensor:
            return 1 / count / self.parts

    parts.trainer = MeanOfMeans


@bug(
    "the micro-batches' means are added up and never divided by their number",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/huggingface/transformers/issues/37766",
)
def accum_no_division(parts: SimpleNamespace) -> None:
    class SumOfMeans(ScaledMicroBatches):
        def factor(self, count: Tensor) -> Tensor:
            return 1 / count

    parts.trainer = SumOfMeans


@bug(
    "gradients are divided by all targets and again by the number of micro-batches",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/huggingface/transformers/issues/35203",
)
def accum_double_normalised(parts: SimpleNamespace) -> None:
    class DividesTwice(Trainer):
        def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
            self.parts = len(self.micro_batches(examples))
            return super().accumulate(examples)

        def normalise(self, count: Tensor) -> None:
            super().normalise(count * self.parts)

    parts.trainer = DividesTwice


@bug("the summed gradient is divided by the targets of the last micro-batch", check_micro_batches_add_up_to_the_whole)
def accum_divides_by_last_count(parts: SimpleNamespace) -> None:
    class LastCount(Trainer):
        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            total, self.last_count = super().backward(examples, weight)
            return total, self.last_count

        def normalise(self, count: Tensor) -> None:
            super().normalise(self.last_count)

    parts.trainer = LastCount


@bug(
    "gradients are reset before every micro-batch: only the last one counts",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/bytetriper/RAE/issues/67",
)
def zero_grad_each_microbatch(parts: SimpleNamespace) -> None:
    class ResetsEachTime(Trainer):
        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            self.zero_grad()
            return super().backward(examples, weight)

    parts.trainer = ResetsEachTime


@bug("backward runs for the last micro-batch only", check_micro_batches_add_up_to_the_whole)
def accum_only_last_backward(parts: SimpleNamespace) -> None:
    class LastOnly(Trainer):
        def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
            *others, last = self.micro_batches(examples)
            computed = [self.compute(self.network, part) for part in others]
            sums = [(total.detach(), count.detach()) for total, count in computed]
            sums.append(self.backward(last, 1.0))
            total, count = (torch.stack(values).sum() for values in zip(*sums, strict=True))
            return total, count.clamp(min=1)

    parts.trainer = LastOnly


@bug(
    "a last micro-batch that is not full is dropped",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/tracel-ai/burn/issues/5695",
)
def accum_partial_window_dropped(parts: SimpleNamespace) -> None:
    class FullOnly(Trainer):
        def micro_batches(self, examples: Sequence[Any]) -> list[Sequence[Any]]:
            found = super().micro_batches(examples)
            return found[:-1] if len(found) > 1 and len(found[-1]) < len(found[0]) else found

    parts.trainer = FullOnly


@bug("each micro-batch is averaged over its own targets", check_a_step_follows_the_gradient, of=parts_with_a_step)
def step_means_of_micro_batches(parts: SimpleNamespace) -> None:
    step_with(parts, micro=lambda total, count, whole: total / count / 3)


@bug("micro-batches are weighted by rows, not targets", check_micro_batches_add_up_to_the_whole, of=parts_with_a_step)
def step_means_by_rows_of_targets(parts: SimpleNamespace) -> None:
    def train_step(
        model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], scheduler: Any = None
    ) -> None:
        tokens, targets = batch
        model.train()
        optimizer.zero_grad()
        for x, y in zip(torch.split(tokens, SIZE), torch.split(targets, SIZE), strict=True):
            mean = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
            (mean * len(x) / len(tokens)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    parts.train_step = train_step
