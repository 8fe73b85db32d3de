"""Mistakes in a plain `train_step(model, optimizer, batch)`, which a subject may bring in the place of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference import reference_parts
from . import bug

FOLLOWS = "check_training.check_a_step_follows_the_gradient"
MICRO = "check_training.check_micro_batches_add_up_to_the_whole"
CLIP = "check_training.check_clipping_scales_the_whole_gradient"
SCALE = "check_training.check_the_loss_scale_cancels"
RATE = "check_optimizer.check_the_learning_rate_follows_its_schedule"
SEED = "check_data.check_a_seed_decides_a_training"
SIZE = 2  # rows of a micro-batch
CLIP_AT, UNSCALE, STEP = "clip", "unscale", "step"
ORDER = (UNSCALE, CLIP_AT, STEP)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    scheduler: Any = None,
    scaler: Any = None,
    max_norm: float | None = None,
) -> float:
    """One step on (tokens, targets), in micro-batches; targets of -100 carry no loss."""
    return a_step(model, optimizer, batch, scheduler, scaler, max_norm)


def a_step(
    model: nn.Module, optimizer: Any, batch: Any, scheduler: Any, scaler: Any, max_norm: float | None,
    *, micro: Callable = lambda total, count, whole: total / whole, order: tuple[str, ...] = ORDER,
) -> float:  # fmt: skip
    """`micro(sum of losses, its targets, all targets)` is what backward is called on; `order` is that of the end."""
    tokens, targets = batch
    whole, reported = (targets != -100).sum(), 0.0
    model.train()
    optimizer.zero_grad()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for x, y in zip(tokens.split(SIZE), targets.split(SIZE), strict=True):
        total = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        scaler.scale(micro(total, (y != -100).sum(), whole)).backward()
        reported += float(total.detach() / whole)
    for what in order:
        if what == UNSCALE:
            scaler.unscale_(optimizer)
        elif what == CLIP_AT and max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        elif what == STEP:
            scaler.step(optimizer)
            scaler.update()
    if scheduler is not None:
        scheduler.step()
    return reported


def parts_with_a_step(**config: Any) -> SimpleNamespace:
    """The reference's model and a train_step, without its trainer."""
    return SimpleNamespace(build_model=reference_parts(**config).build_model, train_step=train_step)


def changed(parts: SimpleNamespace, **how: Any) -> None:
    def train_step(model, optimizer, batch, scheduler=None, scaler=None, max_norm=None):
        return a_step(model, optimizer, batch, scheduler, scaler, max_norm, **how)

    parts.train_step = train_step


def around(parts: SimpleNamespace, change: Callable) -> None:
    """`change(step, model, optimizer, batch, scheduler)`, where `step` takes the same again."""

    def train_step(model, optimizer, batch, scheduler=None):
        def step(model, optimizer, batch, scheduler):
            return a_step(model, optimizer, batch, scheduler, None, None)

        return change(step, model, optimizer, batch, scheduler)

    parts.train_step = train_step


@bug("step-means-of-micro-batches", "each micro-batch's mean over its own targets, then their mean",
     caught_by=(FOLLOWS,), of=parts_with_a_step)  # fmt: skip
def means_of_micro_batches(parts: SimpleNamespace) -> None:
    changed(parts, micro=lambda total, count, whole: total / count / 3)


@bug("step-means-by-rows-of-targets", "micro-batches weigh by their rows: right until their lengths differ",
     caught_by=(MICRO,), of=parts_with_a_step)  # fmt: skip
def means_by_rows(parts: SimpleNamespace) -> None:
    def train_step(model, optimizer, batch, scheduler=None):
        tokens, targets = batch
        model.train()
        optimizer.zero_grad()
        for x, y in zip(tokens.split(SIZE), targets.split(SIZE), strict=True):
            mean = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
            (mean * len(x) / len(tokens)).backward()
        optimizer.step()

    parts.train_step = train_step


@bug("step-clips-too-late", "clip_grad_norm_ after optimizer.step()", caught_by=(CLIP,), of=parts_with_a_step)
def clips_too_late(parts: SimpleNamespace) -> None:
    changed(parts, order=(UNSCALE, STEP, CLIP_AT))


@bug("step-clips-scaled", "gradients are clipped while they are scaled", caught_by=(SCALE,), of=parts_with_a_step)
def clips_scaled(parts: SimpleNamespace) -> None:
    changed(parts, order=(CLIP_AT, UNSCALE, STEP))


@bug("optimizer-steps-twice", "optimizer.step() is called a second time", caught_by=(FOLLOWS,), of=parts_with_a_step)
def steps_twice(parts: SimpleNamespace) -> None:
    def twice(step: Callable, model: nn.Module, optimizer: Any, *given: Any) -> float:
        loss = step(model, optimizer, *given)
        optimizer.step()
        return loss

    around(parts, twice)


@bug("step-by-another-optimizer", "an optimizer made anew at every step forgets its averages", caught_by=(FOLLOWS,),
     of=parts_with_a_step)  # fmt: skip
def by_another_optimizer(parts: SimpleNamespace) -> None:
    def another(step: Callable, model: nn.Module, optimizer: Any, *given: Any) -> float:
        return step(model, torch.optim.SGD(model.parameters(), lr=optimizer.param_groups[0]["lr"]), *given)

    around(parts, another)


@bug("step-pairs-other-rows", "the tokens are shuffled and their targets are not", caught_by=(FOLLOWS,),
     of=parts_with_a_step)  # fmt: skip
def pairs_other_rows(parts: SimpleNamespace) -> None:
    def shuffled(step: Callable, model: nn.Module, optimizer: Any, batch: Any, *given: Any) -> float:
        return step(model, optimizer, (batch[0].roll(1, 0), batch[1]), *given)

    around(parts, shuffled)


@bug("step-ticks-per-micro-batch", "the scheduler is stepped after every micro-batch", caught_by=(RATE,),
     of=parts_with_a_step)  # fmt: skip
def ticks_per_micro_batch(parts: SimpleNamespace) -> None:
    def ticking(step: Callable, model: nn.Module, optimizer: Any, batch: Any, scheduler: Any) -> float:
        loss = step(model, optimizer, batch, scheduler)
        for _ in batch[0].split(SIZE)[1:]:
            if scheduler is not None:
                scheduler.step()
        return loss

    around(parts, ticking)


@bug("step-reseeds", "torch.manual_seed at the start of every step: dropout drops the same units", caught_by=(SEED,),
     of=parts_with_a_step)  # fmt: skip
def reseeds(parts: SimpleNamespace) -> None:
    def seeding(step: Callable, *given: Any) -> float:
        torch.manual_seed(0)
        return step(*given)

    around(parts, seeding)
