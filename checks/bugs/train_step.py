"""Wrong training steps: gradients that are not reset or not divided, steps in the wrong order, wrong reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.data import Batch
from ...transformer.trainer import Trainer
from ..check_optimizer import check_every_parameter_moves
from ..check_training import (
    check_a_step_follows_the_gradient,
    check_a_uniform_stream_is_never_learned,
    check_an_objective_sums_and_counts,
    check_micro_batches_add_up_to_the_whole,
    check_the_reported_loss_is_that_of_the_step,
)
from . import bug
from .damage import step_around
from .designs import parts_with_a_step

# -- gradients and the step


@bug(
    "gradients are never reset: every step adds to those before",
    check_a_step_follows_the_gradient,
    source="https://github.com/meta-pytorch/torchforge/pull/71",
)
def zero_grad_missing(parts: SimpleNamespace) -> None:
    class NeverResets(Trainer):
        def zero_grad(self) -> None:
            pass

    parts.trainer = NeverResets


@bug(
    "gradients are reset between backward and step: the step has none",
    check_a_step_follows_the_gradient,
    check_every_parameter_moves,
    source="https://github.com/cloneofsimo/lora/issues/263",
)
def zero_grad_between_backward_and_step(parts: SimpleNamespace) -> None:
    class ResetsLate(Trainer):
        def clip(self) -> None:
            super().clip()
            self.zero_grad()

    parts.trainer = ResetsLate


@bug("the optimizer steps before backward, on the last step's gradient", check_a_step_follows_the_gradient)
def step_with_stale_gradient(parts: SimpleNamespace) -> None:
    class Stale(Trainer):
        kept: list[Tensor | None] | None = None

        def clip(self) -> None:
            super().clip()
            stale = self.kept or [None] * len(self.parameters)
            self.kept = [parameter.grad for parameter in self.parameters]
            for parameter, gradient in zip(self.parameters, stale, strict=True):
                parameter.grad = gradient

    parts.trainer = Stale


@bug("the summed loss is never divided", check_a_step_follows_the_gradient, check_micro_batches_add_up_to_the_whole)
def normalisation_missing(parts: SimpleNamespace) -> None:
    class NeverDivides(Trainer):
        def normalise(self, count: Tensor) -> None:
            pass

    parts.trainer = NeverDivides


@bug("sign error in the gradient: the loss is maximized", check_a_step_follows_the_gradient)
def step_uphill(parts: SimpleNamespace) -> None:
    class Uphill(Trainer):
        def normalise(self, count: Tensor) -> None:
            super().normalise(-count)

    parts.trainer = Uphill


@bug("optimizer.step() is called twice", check_a_step_follows_the_gradient, of=parts_with_a_step)
def optimizer_steps_twice(parts: SimpleNamespace) -> None:
    def twice(step: Callable[..., float], model: nn.Module, optimizer: Any, *given: Any) -> float:
        loss = step(model, optimizer, *given)
        optimizer.step()
        return loss

    step_around(parts, twice)


@bug("a new optimizer is created in every step", check_a_step_follows_the_gradient, of=parts_with_a_step)
def step_by_another_optimizer(parts: SimpleNamespace) -> None:
    def another(step: Callable[..., float], model: nn.Module, optimizer: Any, *given: Any) -> float:
        return step(model, torch.optim.SGD(model.parameters(), lr=optimizer.param_groups[0]["lr"]), *given)

    step_around(parts, another)


@bug("the tokens are shuffled without their targets", check_a_step_follows_the_gradient, of=parts_with_a_step)
def step_pairs_other_rows(parts: SimpleNamespace) -> None:
    def shuffled(step: Callable[..., float], model: nn.Module, optimizer: Any, batch: Any, *given: Any) -> float:
        return step(model, optimizer, (batch[0].roll(1, 0), batch[1]), *given)

    step_around(parts, shuffled)


# -- the objective


@bug(
    "the logits are compared with the tokens just read instead of the next ones",
    check_a_uniform_stream_is_never_learned,
    check_an_objective_sums_and_counts,
    source="https://github.com/huggingface/transformers/issues/27517",
)
def objective_target_is_input(parts: SimpleNamespace) -> None:
    right = parts.objective
    parts.objective = lambda model, batch: right(model, replace(batch, targets=batch.tokens))


@bug("the count of targets includes padding", check_an_objective_sums_and_counts)
def objective_counts_padding(parts: SimpleNamespace) -> None:
    right = parts.objective

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return right(model, batch)[0], torch.tensor(batch.targets.numel())

    parts.objective = objective


@bug("the sum of losses includes padding", check_an_objective_sums_and_counts)
def objective_sums_padding(parts: SimpleNamespace) -> None:
    right = parts.objective

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        everywhere = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
        return right(model, everywhere)[0], batch.loss_mask.sum()

    parts.objective = objective


# -- the loss that is reported


@bug("the reported loss is the mean of the micro-batches' means", check_the_reported_loss_is_that_of_the_step)
def reported_mean_of_means(parts: SimpleNamespace) -> None:
    class MeanOfMeans(Trainer):
        def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
            self.means: list[Tensor] = []
            _, count = super().accumulate(examples)
            return torch.stack(self.means).mean() * count, count

        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            total, count = super().backward(examples, weight)
            self.means.append(total / count)
            return total, count

    parts.trainer = MeanOfMeans


@bug("the reported loss is that of the last micro-batch", check_the_reported_loss_is_that_of_the_step)
def reported_last_micro_batch(parts: SimpleNamespace) -> None:
    class LastOnly(Trainer):
        def accumulate(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
            _, count = super().accumulate(examples)
            return self.last * count, count

        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            total, count = super().backward(examples, weight)
            self.last = total / count
            return total, count

    parts.trainer = LastOnly


@bug("the reported loss is that of the weights after the step", check_the_reported_loss_is_that_of_the_step)
def reported_after_the_step(parts: SimpleNamespace) -> None:
    class After(Trainer):
        def window(self) -> list[Any]:
            self.taken = super().window()
            return self.taken

        @torch.no_grad()
        def step(self) -> Tensor:
            with torch.enable_grad():
                super().step()
            total, count = self.compute(self.model, self.taken)
            return total / count

    parts.trainer = After
