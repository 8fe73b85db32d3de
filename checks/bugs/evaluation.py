"""Wrong evaluation: how its loss is averaged, dropout that stays on, weights that move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ...transformer import random_state
from ...transformer.trainer import Trainer
from ..check_evaluation import (
    check_evaluation_is_without_dropout,
    check_evaluation_leaves_no_trace,
    check_evaluation_weighs_every_target_alike,
)
from . import bug


def sums_of_batches(trainer: Trainer, examples: Sequence[Any]) -> list[tuple[float, float]]:
    """Sum of losses and count of targets of each batch, in eval mode."""
    size = trainer.config.batch_size
    with torch.no_grad(), trainer.eval_mode(), random_state.preserved(trainer.device):
        found = [trainer.compute(trainer.model, examples[i : i + size]) for i in range(0, len(examples), size)]
    return [(float(total), float(count)) for total, count in found]


@bug(
    "the means of the batches are averaged: targets in short batches weigh more",
    check_evaluation_weighs_every_target_alike,
    source="https://github.com/pytorch/torchtitan/pull/4167",
)
def eval_mean_of_batch_means(parts: SimpleNamespace) -> None:
    class MeanOfMeans(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            means = [total / count for total, count in sums_of_batches(self, examples)]
            return sum(means) / len(means)

    parts.trainer = MeanOfMeans


@bug("only the last batch counts: the loss is overwritten in the loop", check_evaluation_weighs_every_target_alike)
def eval_only_last_batch(parts: SimpleNamespace) -> None:
    class LastOnly(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            total, count = sums_of_batches(self, examples)[-1]
            return total / count

    parts.trainer = LastOnly


@bug(
    "the sum is divided by tokens instead of targets: one too many per example",
    check_evaluation_weighs_every_target_alike,
    source="https://github.com/facebookresearch/colorlessgreenRNNs/pull/4",
)
def eval_denominator_off_by_one(parts: SimpleNamespace) -> None:
    class ByTokens(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            return sum(total for total, _ in sums_of_batches(self, examples)) / sum(map(len, examples))

    parts.trainer = ByTokens


@bug(
    "evaluation runs in training mode: dropout is on",
    check_evaluation_is_without_dropout,
    source="https://github.com/meta-pytorch/torchtune/pull/1049",
)
def eval_with_dropout(parts: SimpleNamespace) -> None:
    class InTrainingMode(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            self.model.train()
            return super().evaluate(examples)

        @contextmanager
        def eval_mode(self) -> Iterator[None]:
            yield

    parts.trainer = InTrainingMode


@bug("an evaluation makes an optimizer step", check_evaluation_leaves_no_trace)
def evaluate_trains(parts: SimpleNamespace) -> None:
    class Steps(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            loss = super().evaluate(examples)
            self.optimizer.step()
            return loss

    parts.trainer = Steps
