"""Mistakes in checkpoints: something is forgotten, shared with the live training, or loaded without a look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ...transformer import checkpoint, random_state
from . import bug
from .trainer import override

RESUMES = "check_checkpoint.check_a_resumed_training_goes_on_bit_for_bit"
PROCESS = "check_checkpoint.check_a_new_process_resumes_bit_for_bit"
SNAPSHOT = "check_checkpoint.check_a_checkpoint_is_a_snapshot"
SAVING = "check_checkpoint.check_saving_changes_nothing"
OTHER = "check_checkpoint.check_other_weights_are_refused"
CODE = "check_checkpoint.check_a_file_with_code_is_not_run"


def forgets(parts: SimpleNamespace, name: str) -> None:
    """A trainer that keeps its own value of one entry when it resumes."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right.load_state_dict(self, {**state, name: self.right.state_dict(self)[name]})

    override(parts, load_state_dict=load_state_dict)


@bug(
    "checkpoint-without-step",
    "the count of steps is not restored: the schedule begins anew",
    caught_by=(RESUMES,),
    source="https://github.com/opensportslab/opensportslib/pull/65",
)
def checkpoint_without_step(parts: SimpleNamespace) -> None:
    forgets(parts, "steps_done")


@bug(
    "checkpoint-without-rng",
    "the random state is not restored: dropout draws anew",
    caught_by=(RESUMES, PROCESS),
    source="https://github.com/huggingface/accelerate/pull/4232",
)
def checkpoint_without_rng(parts: SimpleNamespace) -> None:
    forgets(parts, "random")


@bug(
    "resume-replays-data-order",
    "the place in the data is not restored: examples already seen come again",
    caught_by=(RESUMES,),
    source="https://github.com/huggingface/accelerate/pull/4071",
)
def resume_replays_data_order(parts: SimpleNamespace) -> None:
    forgets(parts, "order")


@bug("checkpoint-without-optimizer", "the optimizer's averages are not restored", caught_by=(RESUMES,))
def checkpoint_without_optimizer(parts: SimpleNamespace) -> None:
    forgets(parts, "optimizer")


@bug(
    "checkpoint-aliases-live-weights",
    "the saved state is kept by reference: it goes on training",
    caught_by=(SNAPSHOT,),
    source="https://github.com/pytorch/tutorials/pull/188",
)
def checkpoint_aliases_live_weights(parts: SimpleNamespace) -> None:
    kept: dict[str, Any] = {}

    def save(self, path):
        self.right.save(self, path)
        kept[str(path)] = self.model.state_dict()

    def resume(self, path):
        self.right.resume(self, path)
        checkpoint.load_weights(self.model, kept[str(path)])

    override(parts, save=save, resume=resume)


@bug("saving-draws", "saving draws a number, for its file's name, from the training's own state", caught_by=(SAVING,))
def saving_draws(parts: SimpleNamespace) -> None:
    def save(self, path):
        self.right.save(self, path)
        with random_state.preserved(self.device):
            random_state.restore(self.random, self.device)
            torch.rand(1)
            self.random = random_state.current(self.device)

    override(parts, save=save)


@bug("load-not-strict", "strict=False: missing and unknown tensors go unnoticed", caught_by=(OTHER,))
def load_not_strict(parts: SimpleNamespace) -> None:
    parts.load_weights = lambda model, weights: model.load_state_dict(weights, strict=False)


@bug("load-half-way", "tensors are copied one by one until one does not fit", caught_by=(OTHER,))
def load_half_way(parts: SimpleNamespace) -> None:
    def load_weights(model, weights):
        own = model.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        if set(own) != set(weights):
            raise KeyError(set(own) ^ set(weights))

    parts.load_weights = load_weights


@bug("load-runs-code", "weights_only=False: a checkpoint may run anything", caught_by=(CODE,))
def load_runs_code(parts: SimpleNamespace) -> None:
    parts.load = lambda path: torch.load(path, map_location="cpu", weights_only=False)
