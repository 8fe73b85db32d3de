"""Wrong optimizers and schedules: which parameters they have, weight decay, learning rate, low-precision weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...transformer.model import Transformer
from ...transformer.train_config import TrainConfig
from ...transformer.trainer import Data, Trainer
from ..check_optimizer import (
    check_decay_keeps_to_its_groups,
    check_every_parameter_moves,
    check_small_updates_survive_low_precision,
    check_the_learning_rate_follows_its_schedule,
    check_the_models_own_optimizer_decays_matrices,
    check_the_models_own_optimizer_holds_each_parameter_once,
    check_the_optimizer_owns_each_parameter_once,
)
from . import bug
from .damage import step_around
from .designs import SIZE, changed, parts_with_a_step

# -- an optimizer that the model makes for itself, in two groups


class MakesItsOptimizer(Transformer):
    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad and self.is_held(name)]
        groups = [
            {"params": [p for _, p in named if self.decays(p)], "weight_decay": weight_decay},
            {"params": [p for _, p in named if not self.decays(p)], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)

    def is_held(self, name: str) -> bool:
        return True

    def decays(self, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2


def with_its_optimizer(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = MakesItsOptimizer

    return changed(change, **config)


@bug(
    "biases and gains are in the group that decays, and matrices in the other",
    check_the_models_own_optimizer_decays_matrices,
    of=with_its_optimizer,
)
def decay_groups_exchanged(model: Transformer) -> None:
    class Exchanged(MakesItsOptimizer):
        def decays(self, parameter: nn.Parameter) -> bool:
            return parameter.dim() < 2

    model.__class__ = Exchanged


@bug(
    "the groups of the model's optimizer are chosen by the names of projections, which the last norm has not",
    check_the_models_own_optimizer_holds_each_parameter_once,
    of=with_its_optimizer,
)
def group_forgets_the_last_norm(model: Transformer) -> None:
    class Forgets(MakesItsOptimizer):
        def is_held(self, name: str) -> bool:
            return not name.startswith("norm")

    model.__class__ = Forgets


# -- which parameters


def rebuilt(parts: SimpleNamespace, change: Callable[[Trainer], None]) -> None:
    """A trainer whose optimizer is changed once it is built."""

    class Rebuilt(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            change(self)

    parts.trainer = Rebuilt


@bug(
    "the optimizer has no embeddings: a filter by name drops them",
    check_the_optimizer_owns_each_parameter_once,
    check_every_parameter_moves,
    source="https://github.com/ooples/AiDotNet/pull/1210",
)
def optimizer_misses_embeddings(parts: SimpleNamespace) -> None:
    def drop(trainer: Trainer) -> None:
        tables = {id(m.weight) for m in trainer.model.modules() if isinstance(m, nn.Embedding)}
        for group in trainer.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in tables]

    rebuilt(parts, drop)


@bug(
    "the optimizer has a parameter that the model has since replaced",
    check_the_optimizer_owns_each_parameter_once,
    check_every_parameter_moves,
    source="https://github.com/CodefyUI/CodefyUI/pull/147",
)
def optimizer_holds_stale_params(parts: SimpleNamespace) -> None:
    def renew(trainer: Trainer) -> None:
        output = cast(Transformer, trainer.model).blocks[0].get_submodule("attention.output")
        output.weight = nn.Parameter(cast(Tensor, output.weight).detach().clone())

    rebuilt(parts, renew)


@bug("the optimizer has tied weights twice and updates them twice", check_the_optimizer_owns_each_parameter_once)
def optimizer_holds_twice(parts: SimpleNamespace) -> None:
    def repeat(trainer: Trainer) -> None:
        group = trainer.optimizer.param_groups[-1]
        group["params"] = [*group["params"], cast(Transformer, trainer.model).embedding.weight]

    rebuilt(parts, repeat)


@bug("frozen parameters are unfrozen before training", check_every_parameter_moves)
def optimizer_moves_frozen(parts: SimpleNamespace) -> None:
    class Unfreezes(Trainer):
        def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            model.requires_grad_(True)
            super().__init__(model, *args, **kwargs)

    parts.trainer = Unfreezes


# -- weight decay


@bug(
    "RMSNorm gains decay: norms are recognized by isinstance(LayerNorm)",
    check_decay_keeps_to_its_groups,
    source="https://github.com/bigscience-workshop/Megatron-DeepSpeed/pull/262",
    norm="rms",
)
def norm_alias_in_decay_group(parts: SimpleNamespace) -> None:
    def by_class(trainer: Trainer) -> None:
        aliases = {id(m.weight) for m in trainer.model.modules() if isinstance(m, nn.RMSNorm)}
        decaying, lasting = trainer.optimizer.param_groups
        decaying["params"] += [p for p in lasting["params"] if id(p) in aliases]
        lasting["params"] = [p for p in lasting["params"] if id(p) not in aliases]

    rebuilt(parts, by_class)


@bug("weight decay applies to all parameters, norms and biases included", check_decay_keeps_to_its_groups)
def decay_on_everything(parts: SimpleNamespace) -> None:
    def all_decay(trainer: Trainer) -> None:
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] = trainer.config.weight_decay

    rebuilt(parts, all_decay)


@bug("weight decay is applied by the optimizer and again by hand", check_decay_keeps_to_its_groups)
def decay_twice(parts: SimpleNamespace) -> None:
    class DecaysTwice(Trainer):
        def tick(self) -> None:
            super().tick()
            with torch.no_grad():
                for group in self.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])

    parts.trainer = DecaysTwice


# -- the learning rate


@bug(
    "the schedule advances once per micro-batch instead of once per step",
    check_the_learning_rate_follows_its_schedule,
    source="https://github.com/huggingface/accelerate/pull/999",
)
def scheduler_per_microbatch(parts: SimpleNamespace) -> None:
    class TicksEachTime(Trainer):
        ticks: int

        def backward(self, examples: Sequence[Any], weight: float) -> tuple[Tensor, Tensor]:
            self.ticks = getattr(self, "ticks", -1) + 1
            return super().backward(examples, weight)

        def learning_rate(self, done: int) -> float:
            return super().learning_rate(self.ticks)

    parts.trainer = TicksEachTime


@bug(
    "the schedule advances before the first step: the first learning rate is skipped",
    check_the_learning_rate_follows_its_schedule,
    source="https://github.com/lonePatient/BERT-NER-Pytorch/issues/33",
)
def scheduler_off_by_one(parts: SimpleNamespace) -> None:
    class TicksEarly(Trainer):
        def learning_rate(self, done: int) -> float:
            return super().learning_rate(done + 1)

    parts.trainer = TicksEarly


@bug("the schedule never advances: the first learning rate stays", check_the_learning_rate_follows_its_schedule)
def scheduler_never_ticks(parts: SimpleNamespace) -> None:
    class NeverTicks(Trainer):
        def learning_rate(self, done: int) -> float:
            return super().learning_rate(0)

    parts.trainer = NeverTicks


@bug("scheduler.step() follows every micro-batch", check_the_learning_rate_follows_its_schedule, of=parts_with_a_step)
def step_ticks_per_micro_batch(parts: SimpleNamespace) -> None:
    def ticking(step: Callable[..., float], model: nn.Module, optimizer: Any, batch: Any, scheduler: Any) -> float:
        loss = step(model, optimizer, batch, scheduler)
        for _ in batch[0].split(SIZE)[1:]:
            if scheduler is not None:
                scheduler.step()
        return loss

    step_around(parts, ticking)


# -- weights in low precision


@bug(
    "weights are stored in bfloat16: updates below 1/256 of a weight are lost",
    check_small_updates_survive_low_precision,
    source="https://github.com/pytorch/ao/pull/1124",
)
def bf16_master_weights(parts: SimpleNamespace) -> None:
    class LowWeights(Trainer):
        def __init__(self, model: nn.Module, data: Data, config: TrainConfig, *args: Any, **kwargs: Any) -> None:
            low = config.precision == "bfloat16"
            super().__init__(model.bfloat16() if low else model, data, config, *args, **kwargs)

    parts.trainer = LowWeights


@bug(
    "norm gains are stored in bfloat16, where 1 + 1e-3 is 1: they never change",
    check_small_updates_survive_low_precision,
    source="https://github.com/fla-org/flash-linear-attention/pull/676",
)
def norm_weights_frozen_by_dtype(parts: SimpleNamespace) -> None:
    class LowGains(Trainer):
        def tick(self) -> None:
            super().tick()
            if self.config.precision == "bfloat16":
                with torch.no_grad():
                    for module in self.model.modules():
                        if isinstance(module, nn.LayerNorm):
                            module.weight.copy_(module.weight.bfloat16())

    parts.trainer = LowGains
