"""Wrong checkpoints: state that is not restored, shared with the live training, or loaded without a check."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer import checkpoint
from ...transformer.trainer import Trainer
from ..check_checkpoint import (
    check_a_checkpoint_is_a_snapshot,
    check_a_file_with_code_is_not_run,
    check_a_new_process_resumes_bit_for_bit,
    check_a_resumed_training_goes_on_bit_for_bit,
    check_other_weights_are_refused,
)
from . import bug

# -- what is not restored


def forgets(parts: SimpleNamespace, name: str) -> None:
    """A trainer that keeps its own value of one entry when it resumes."""

    class Forgets(Trainer):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict({**state, name: super().state_dict()[name]})

    parts.trainer = Forgets


@bug(
    "the step count is not restored: the schedule starts over",
    check_a_resumed_training_goes_on_bit_for_bit,
    source="https://github.com/opensportslab/opensportslib/pull/65",
)
def checkpoint_without_step(parts: SimpleNamespace) -> None:
    forgets(parts, "steps_done")


@bug(
    "the random state is not restored: dropout draws other masks",
    check_a_resumed_training_goes_on_bit_for_bit,
    check_a_new_process_resumes_bit_for_bit,
    source="https://github.com/huggingface/accelerate/pull/4232",
)
def checkpoint_without_rng(parts: SimpleNamespace) -> None:
    forgets(parts, "random")


@bug(
    "the position in the data is not restored: examples are repeated",
    check_a_resumed_training_goes_on_bit_for_bit,
    source="https://github.com/huggingface/accelerate/pull/4071",
)
def resume_replays_data_order(parts: SimpleNamespace) -> None:
    forgets(parts, "order")


@bug("the optimizer's averages are not restored", check_a_resumed_training_goes_on_bit_for_bit)
def checkpoint_without_optimizer(parts: SimpleNamespace) -> None:
    forgets(parts, "optimizer")


@bug(
    "the saved weights share memory with the live ones: training changes them",
    check_a_checkpoint_is_a_snapshot,
    source="https://github.com/pytorch/tutorials/pull/188",
)
def checkpoint_aliases_live_weights(parts: SimpleNamespace) -> None:
    kept: dict[str, Any] = {}

    class Aliases(Trainer):
        def save(self, path: str | Path) -> None:
            super().save(path)
            kept[str(path)] = self.model.state_dict()

        def resume(self, path: str | Path) -> None:
            super().resume(path)
            checkpoint.load_weights(self.model, kept[str(path)])

    parts.trainer = Aliases


# -- how a file is loaded


@bug("strict=False: missing and unexpected tensors go unnoticed", check_other_weights_are_refused)
def load_not_strict(parts: SimpleNamespace) -> None:
    parts.load_weights = lambda model, weights: model.load_state_dict(weights, strict=False)


@bug("weights are copied one by one: a load that fails half-way leaves some changed", check_other_weights_are_refused)
def load_half_way(parts: SimpleNamespace) -> None:
    def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
        own = model.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        if set(own) != set(weights):
            raise KeyError(set(own) ^ set(weights))

    parts.load_weights = load_weights


@bug("weights_only=False: a checkpoint can run any code", check_a_file_with_code_is_not_run)
def load_runs_code(parts: SimpleNamespace) -> None:
    parts.load = lambda path: torch.load(path, map_location="cpu", weights_only=False)
