"""Wrong seeds and random states: what no seed decides, and what changes the draws of everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer import random_state
from ...transformer.model import Attention, Block, Rotation, Transformer
from ...transformer.train_config import TrainConfig
from ...transformer.trainer import Data, Trainer
from ..check_checkpoint import check_saving_changes_nothing
from ..check_data import check_a_seed_decides_a_training, check_processes_draw_from_streams_of_their_own
from ..check_devices import check_deterministic_algorithms_repeat_the_step
from ..check_evaluation import check_evaluation_leaves_no_trace, check_looking_does_not_change_the_training
from ..check_modes import check_dropout_draws_anew, check_eval_leaves_random_state_alone
from . import bug
from .damage import attend_with, step_around
from .designs import parts_with_a_step

# -- in a forward


@bug("every forward seeds the global random generator", check_eval_leaves_random_state_alone, check_dropout_draws_anew)
def forward_reseeds(model: Transformer) -> None:
    class Reseeding(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            torch.manual_seed(1337)
            return super().embed(tokens)

    model.__class__ = Reseeding


@bug("every training forward seeds the global generator after its last dropout", check_dropout_draws_anew)
def training_forward_reseeds(model: Transformer) -> None:
    class Reseeding(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            out = super().residual(x, update)
            if self.training:
                torch.manual_seed(0)
            return out

    model.blocks[-1].__class__ = Reseeding


@bug("random numbers are drawn in eval mode too: the global random state changes", check_eval_leaves_random_state_alone)
def eval_draws_noise(model: Transformer) -> None:
    class Noisy(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            return x + (0.1 if self.training else 0.0) * torch.randn_like(x)

    model.__class__ = Noisy


@bug("training adds noise from a generator seeded by the clock", check_deterministic_algorithms_repeat_the_step)
def jitter_no_seed_reaches(model: Transformer) -> None:
    generator = torch.Generator()
    generator.seed()

    class Jittered(Attention):
        def place(self, q: Tensor, k: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor]:
            q, k = super().place(q, k, rotate)
            noise = torch.randn(q.shape, generator=generator).to(q)
            return (q + 0.01 * noise if self.training else q), k

    attend_with(model, Jittered)


# -- in a training


@bug(
    "training is not seeded: dropout draws from the random state that the caller left", check_a_seed_decides_a_training
)
def training_is_not_seeded(parts: SimpleNamespace) -> None:
    class Unseeded(Trainer):
        @contextmanager
        def own_random_state(self) -> Iterator[None]:
            yield

    parts.trainer = Unseeded


@bug("the configured seed is ignored: order and dropout begin from a fixed one", check_a_seed_decides_a_training)
def seed_is_ignored(parts: SimpleNamespace) -> None:
    class FixedSeed(Trainer):
        def __init__(self, model: nn.Module, data: Data, config: TrainConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(model, data, replace(config, seed=1337), *args, **kwargs)

    parts.trainer = FixedSeed


@bug(
    "all processes use the same seed: they draw the same noise",
    check_processes_draw_from_streams_of_their_own,
    source="https://github.com/pytorch/pytorch/issues/5059",
)
def dataloader_workers_same_seed(parts: SimpleNamespace) -> None:
    class SameSeed(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.random = random_state.seeded(self.config.seed, self.device)

    parts.trainer = SameSeed


@bug("every step calls torch.manual_seed: same dropout masks", check_a_seed_decides_a_training, of=parts_with_a_step)
def step_reseeds(parts: SimpleNamespace) -> None:
    def seeding(step: Callable[..., float], *given: Any) -> float:
        torch.manual_seed(0)
        return step(*given)

    step_around(parts, seeding)


@bug(
    "every evaluation reseeds the training: the same dropout masks follow each evaluation",
    check_looking_does_not_change_the_training,
    source="https://github.com/huggingface/diffusers/issues/7991",
)
def sampling_reseeds_training(parts: SimpleNamespace) -> None:
    class Reseeds(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            self.random = random_state.seeded(self.config.seed, self.device)
            return super().evaluate(examples)

    parts.trainer = Reseeds


@bug("an evaluation seeds the global random state and does not restore it", check_evaluation_leaves_no_trace)
def evaluation_draws(parts: SimpleNamespace) -> None:
    class Seeds(Trainer):
        def evaluate(self, examples: Sequence[Any]) -> float:
            torch.manual_seed(0)
            return super().evaluate(examples)

    parts.trainer = Seeds


@bug("saving a checkpoint draws a number from the training's random state", check_saving_changes_nothing)
def saving_draws(parts: SimpleNamespace) -> None:
    class Draws(Trainer):
        def save(self, path: str | Path) -> None:
            super().save(path)
            with random_state.preserved(self.device):
                random_state.restore(self.random, self.device)
                torch.rand(1)  # as for a file's name
                self.random = random_state.current(self.device)

    parts.trainer = Draws
