"""Wrong gradient clipping: missing, at the wrong time, or of something other than the norm of the whole gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.trainer import Trainer
from ..check_training import (
    check_clipping_scales_the_whole_gradient,
    check_micro_batches_add_up_to_the_whole,
    check_the_loss_scale_cancels,
)
from . import bug
from .damage import step_with
from .designs import CLIP_AT, STEP, UNSCALE, parts_with_a_step

# -- when


@bug("gradients are never clipped: the configured limit is not used", check_clipping_scales_the_whole_gradient)
def clip_missing(parts: SimpleNamespace) -> None:
    class NeverClips(Trainer):
        def clip(self) -> None:
            pass

    parts.trainer = NeverClips


@bug(
    "gradients are clipped after the optimizer step",
    check_clipping_scales_the_whole_gradient,
    source="https://github.com/awslabs/graphstorm/pull/1382",
)
def clip_after_step(parts: SimpleNamespace) -> None:
    class ClipsLate(Trainer):
        def clip(self) -> None:
            pass

        def tick(self) -> None:
            super().tick()
            super().clip()

    parts.trainer = ClipsLate


@bug(
    "gradients are clipped before backward computes them",
    check_clipping_scales_the_whole_gradient,
    source="https://github.com/simchowitzlabpublic/nano-world-model/pull/22",
)
def clip_before_backward(parts: SimpleNamespace) -> None:
    class ClipsEarly(Trainer):
        def zero_grad(self) -> None:
            super().zero_grad()
            super().clip()

        def clip(self) -> None:
            pass

    parts.trainer = ClipsEarly


@bug(
    "gradients are clipped after every micro-batch instead of once a step",
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/huggingface/transformers/issues/1563",
)
def clip_per_microbatch(parts: SimpleNamespace) -> None:
    class ClipsEach(Trainer):
        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            found = super().backward(examples, weight)
            super().clip()
            return found

        def clip(self) -> None:
            pass

    parts.trainer = ClipsEach


@bug(
    "gradients are clipped before they are divided by the number of targets",
    check_the_loss_scale_cancels,
    check_clipping_scales_the_whole_gradient,
    check_micro_batches_add_up_to_the_whole,
    source="https://github.com/Lightning-AI/pytorch-lightning/issues/9330",
)
def clip_before_unscale(parts: SimpleNamespace) -> None:
    class ClipsTheSum(Trainer):
        def normalise(self, count: Tensor) -> None:
            super().clip()
            super().normalise(count)

        def clip(self) -> None:
            pass

    parts.trainer = ClipsTheSum


@bug("clip_grad_norm_ is called after optimizer.step()", check_clipping_scales_the_whole_gradient, of=parts_with_a_step)
def step_clips_too_late(parts: SimpleNamespace) -> None:
    step_with(parts, order=(UNSCALE, STEP, CLIP_AT))


@bug("gradients are clipped before the loss scale is removed", check_the_loss_scale_cancels, of=parts_with_a_step)
def step_clips_scaled(parts: SimpleNamespace) -> None:
    step_with(parts, order=(CLIP_AT, UNSCALE, STEP))


# -- what


def clip_with(parts: SimpleNamespace, clip: Callable[[list[nn.Parameter], float], object]) -> None:
    """`clip(parameters, limit)` in the place of the trainer's, where there is a limit."""

    class Clips(Trainer):
        def clip(self) -> None:
            if self.config.clip_norm is not None:
                clip(self.parameters, self.config.clip_norm)

    parts.trainer = Clips


@bug("each parameter's gradient is clipped separately: the direction changes", check_clipping_scales_the_whole_gradient)
def clip_per_parameter(parts: SimpleNamespace) -> None:
    def each(parameters: list[nn.Parameter], limit: float) -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, limit)

    clip_with(parts, each)


@bug("gradients are clipped entry by entry instead of by their norm", check_clipping_scales_the_whole_gradient)
def clip_by_value(parts: SimpleNamespace) -> None:
    clip_with(parts, nn.utils.clip_grad_value_)


@bug("gradients below the limit are scaled up to it", check_clipping_scales_the_whole_gradient)
def clip_always_normalises(parts: SimpleNamespace) -> None:
    def stretch(parameters: list[nn.Parameter], limit: float) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(limit / (norm + 1e-6))

    clip_with(parts, stretch)


@bug("gradients are clipped by their largest entry instead of their L2 norm", check_clipping_scales_the_whole_gradient)
def clip_by_another_norm(parts: SimpleNamespace) -> None:
    clip_with(parts, lambda parameters, limit: nn.utils.clip_grad_norm_(parameters, limit, norm_type=math.inf))
