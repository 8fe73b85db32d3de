"""Mistakes in training: each overrides one method of the reference's Trainer, or what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import bug

FOLLOWS = "check_training.check_a_step_follows_the_gradient"
MICRO = "check_training.check_micro_batches_add_up_to_the_whole"
CLIP = "check_training.check_clipping_scales_the_whole_gradient"
SCALE = "check_training.check_the_loss_scale_cancels"
STREAM = "check_training.check_a_uniform_stream_is_never_learned"
OBJECTIVE = "check_training.check_an_objective_sums_and_counts"
REPORTED = "check_training.check_the_reported_loss_is_that_of_the_step"
MODE = "check_training.check_a_step_is_made_in_train_mode"
MOVES = "check_optimizer.check_every_parameter_moves"
OWNS = "check_optimizer.check_the_optimizer_owns_each_parameter_once"
DECAY = "check_optimizer.check_decay_keeps_to_its_groups"
RATE = "check_optimizer.check_the_learning_rate_follows_its_schedule"
SMALL = "check_optimizer.check_small_updates_survive_low_precision"


def override(parts: SimpleNamespace, **methods: Callable) -> None:
    """A trainer of the reference's kind with other methods; they find the right ones in `right`."""
    right = parts.trainer
    parts.trainer = type("Trainer", (right,), dict(methods))
    parts.trainer.right = right


# one step


@bug(
    "zero-grad-missing",
    "gradients are never reset: every step adds to all those before",
    caught_by=(FOLLOWS,),
    source="https://github.com/meta-pytorch/torchforge/pull/71",
)
def zero_grad_missing(parts: SimpleNamespace) -> None:
    override(parts, zero_grad=lambda self: None)


@bug(
    "zero-grad-between-backward-and-step",
    "gradients are reset after backward: the step has nothing to go by",
    caught_by=(FOLLOWS, MOVES),
    source="https://github.com/cloneofsimo/lora/issues/263",
)
def zero_grad_between_backward_and_step(parts: SimpleNamespace) -> None:
    def clip(self):
        self.right.clip(self)
        self.zero_grad()

    override(parts, clip=clip)


@bug("normalisation-missing", "the sum over targets is never divided by their number", caught_by=(FOLLOWS, MICRO))
def normalisation_missing(parts: SimpleNamespace) -> None:
    override(parts, normalise=lambda self, count: None)


@bug("step-uphill", "the loss is maximized: its sign is wrong", caught_by=(FOLLOWS,))
def step_uphill(parts: SimpleNamespace) -> None:
    override(parts, normalise=lambda self, count: self.right.normalise(self, -count))


@bug("step-with-stale-gradient", "the optimizer steps before this window's backward", caught_by=(FOLLOWS,))
def step_with_stale_gradient(parts: SimpleNamespace) -> None:
    def clip(self):
        self.right.clip(self)
        kept = getattr(self, "kept", [None] * len(self.parameters))
        self.kept = [parameter.grad for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, kept, strict=True):
            parameter.grad = gradient

    override(parts, clip=clip)


# accumulation


def micro(self: Any, part: Sequence, weight: float, scale: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """One micro-batch whose gradient is scaled by a function of its count of targets."""
    total, count = self.compute(self.network, part)
    (total * weight * scale(count)).backward()
    return total.detach(), count * weight


@bug(
    "accum-mean-of-means",
    "the mean of the micro-batches' means: targets in short micro-batches count more",
    caught_by=(MICRO,),
    source="https://github.com/huggingface/transformers/issues/34242",
)
def accum_mean_of_means(parts: SimpleNamespace) -> None:
    def accumulate(self, examples):
        self.parts = len(self.micro_batches(examples))
        return self.right.accumulate(self, examples)

    override(
        parts,
        accumulate=accumulate,
        backward=lambda self, part, weight: micro(self, part, weight, lambda n: 1 / n / self.parts),
        normalise=lambda self, count: None,
    )


@bug(
    "accum-no-division",
    "the means of the micro-batches are added up and never divided by their number",
    caught_by=(MICRO,),
    source="https://github.com/huggingface/transformers/issues/37766",
)
def accum_no_division(parts: SimpleNamespace) -> None:
    override(
        parts,
        backward=lambda self, part, weight: micro(self, part, weight, lambda n: 1 / n),
        normalise=lambda self, count: None,
    )


@bug(
    "accum-double-normalised",
    "divided by all targets, and again by the number of micro-batches",
    caught_by=(MICRO,),
    source="https://github.com/huggingface/transformers/issues/35203",
)
def accum_double_normalised(parts: SimpleNamespace) -> None:
    def accumulate(self, examples):
        self.parts = len(self.micro_batches(examples))
        return self.right.accumulate(self, examples)

    override(parts, accumulate=accumulate, normalise=lambda self, n: self.right.normalise(self, n * self.parts))


@bug("accum-divides-by-last-count", "the sum is divided by the targets of the last micro-batch", caught_by=(MICRO,))
def accum_divides_by_last_count(parts: SimpleNamespace) -> None:
    def backward(self, part, weight):
        total, self.last_count = self.right.backward(self, part, weight)
        return total, self.last_count

    override(parts, backward=backward, normalise=lambda self, count: self.right.normalise(self, self.last_count))


@bug(
    "zero-grad-each-microbatch",
    "gradients are reset before every micro-batch: only the last one counts",
    caught_by=(MICRO,),
    source="https://github.com/bytetriper/RAE/issues/67",
)
def zero_grad_each_microbatch(parts: SimpleNamespace) -> None:
    def backward(self, part, weight):
        self.zero_grad()
        return self.right.backward(self, part, weight)

    override(parts, backward=backward)


@bug("accum-only-last-backward", "backward runs for the last micro-batch only", caught_by=(MICRO,))
def accum_only_last_backward(parts: SimpleNamespace) -> None:
    def accumulate(self, examples):
        *others, last = self.micro_batches(examples)
        sums = [tuple(value.detach() for value in self.compute(self.network, part)) for part in others]
        sums.append(self.backward(last, 1.0))
        total, count = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        return total, count.clamp(min=1)

    override(parts, accumulate=accumulate)


@bug(
    "accum-partial-window-dropped",
    "a last micro-batch that is not full is dropped",
    caught_by=(MICRO,),
    source="https://github.com/tracel-ai/burn/issues/5695",
)
def accum_partial_window_dropped(parts: SimpleNamespace) -> None:
    def micro_batches(self, examples):
        found = self.right.micro_batches(self, examples)
        return found[:-1] if len(found) > 1 and len(found[-1]) < len(found[0]) else found

    override(parts, micro_batches=micro_batches)


# clipping


def clip_with(change: Callable[[Any], None]) -> Callable[[Any], None]:
    def clip(self):
        if self.config.clip_norm is not None:
            change(self)

    return clip


def gradients(self: Any) -> list[Tensor]:
    return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


@bug("clip-missing", "the clipping norm is read from the configuration and never used", caught_by=(CLIP,))
def clip_missing(parts: SimpleNamespace) -> None:
    override(parts, clip=lambda self: None)


@bug(
    "clip-after-step",
    "gradients are clipped once the optimizer has used them",
    caught_by=(CLIP,),
    source="https://github.com/awslabs/graphstorm/pull/1382",
)
def clip_after_step(parts: SimpleNamespace) -> None:
    def tick(self):
        self.right.tick(self)
        self.right.clip(self)

    override(parts, clip=lambda self: None, tick=tick)


@bug(
    "clip-before-backward",
    "gradients are clipped before backward computes them",
    caught_by=(CLIP,),
    source="https://github.com/simchowitzlabpublic/nano-world-model/pull/22",
)
def clip_before_backward(parts: SimpleNamespace) -> None:
    def zero_grad(self):
        self.right.zero_grad(self)
        self.right.clip(self)

    override(parts, zero_grad=zero_grad, clip=lambda self: None)


@bug(
    "clip-per-microbatch",
    "gradients are clipped after every micro-batch, not once for the window",
    caught_by=(MICRO,),
    source="https://github.com/huggingface/transformers/issues/1563",
)
def clip_per_microbatch(parts: SimpleNamespace) -> None:
    def backward(self, part, weight):
        found = self.right.backward(self, part, weight)
        self.right.clip(self)
        return found

    override(parts, backward=backward, clip=lambda self: None)


@bug(
    "clip-before-unscale",
    "gradients are clipped before they are divided: the limit means something else for every count",
    caught_by=(SCALE, CLIP, MICRO),
    source="https://github.com/Lightning-AI/pytorch-lightning/issues/9330",
)
def clip_before_unscale(parts: SimpleNamespace) -> None:
    def normalise(self, count):
        self.right.clip(self)
        self.right.normalise(self, count)

    override(parts, normalise=normalise, clip=lambda self: None)


@bug("clip-per-parameter", "every parameter's gradient is clipped by itself, which turns the whole", caught_by=(CLIP,))
def clip_per_parameter(parts: SimpleNamespace) -> None:
    def each(self):
        for parameter in self.parameters:
            nn.utils.clip_grad_norm_(parameter, self.config.clip_norm)

    override(parts, clip=clip_with(each))


@bug("clip-by-value", "the entries of the gradient are clipped, not its length", caught_by=(CLIP,))
def clip_by_value(parts: SimpleNamespace) -> None:
    override(parts, clip=clip_with(lambda self: nn.utils.clip_grad_value_(self.parameters, self.config.clip_norm)))


@bug("clip-always-normalises", "short gradients are stretched to the limit too", caught_by=(CLIP,))
def clip_always_normalises(parts: SimpleNamespace) -> None:
    def stretch(self):
        norm = torch.stack([g.norm() for g in gradients(self)]).norm()
        for g in gradients(self):
            g.mul_(self.config.clip_norm / (norm + 1e-6))

    override(parts, clip=clip_with(stretch))


@bug("clip-by-another-norm", "gradients are clipped by their largest entry instead of their length", caught_by=(CLIP,))
def clip_by_another_norm(parts: SimpleNamespace) -> None:
    def by_largest(self):
        nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm, norm_type=float("inf"))

    override(parts, clip=clip_with(by_largest))


# what is reported


@bug("reported-mean-of-means", "the loss reported is the mean of the micro-batches' means", caught_by=(REPORTED,))
def reported_mean_of_means(parts: SimpleNamespace) -> None:
    def accumulate(self, examples):
        self.means = []
        _, count = self.right.accumulate(self, examples)
        return torch.stack(self.means).mean() * count, count

    def backward(self, part, weight):
        total, count = self.right.backward(self, part, weight)
        self.means.append(total / count)
        return total, count

    override(parts, accumulate=accumulate, backward=backward)


@bug("reported-last-micro-batch", "the loss reported is that of the last micro-batch", caught_by=(REPORTED,))
def reported_last_micro_batch(parts: SimpleNamespace) -> None:
    def accumulate(self, examples):
        _, count = self.right.accumulate(self, examples)
        return self.last * count, count

    def backward(self, part, weight):
        total, count = self.right.backward(self, part, weight)
        self.last = total / count
        return total, count

    override(parts, accumulate=accumulate, backward=backward)


@bug("reported-after-the-step", "the loss reported is that of the weights after the step", caught_by=(REPORTED,))
def reported_after_the_step(parts: SimpleNamespace) -> None:
    def window(self):
        self.taken = self.right.window(self)
        return self.taken

    @torch.no_grad()
    def step(self):
        with torch.enable_grad():
            self.right.step(self)
        total, count = self.compute(self.model, self.taken)
        return total / count

    override(parts, window=window, step=step)


# the objective


@bug("objective-counts-padding", "the count of targets is that of all places, padding included", caught_by=(OBJECTIVE,))
def objective_counts_padding(parts: SimpleNamespace) -> None:
    right = parts.objective

    def objective(model, batch):
        return right(model, batch)[0], torch.tensor(batch.targets.numel())

    parts.objective = objective


@bug("objective-sums-padding", "the sum of losses goes over padding too", caught_by=(OBJECTIVE,))
def objective_sums_padding(parts: SimpleNamespace) -> None:
    right = parts.objective

    def objective(model, batch):
        everywhere = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
        return right(model, everywhere)[0], batch.loss_mask.sum()

    parts.objective = objective


@bug(
    "objective-target-is-input",
    "the objective compares the logits with the tokens just read",
    caught_by=(STREAM, OBJECTIVE),
    source="https://github.com/huggingface/transformers/issues/27517",
)
def objective_target_is_input(parts: SimpleNamespace) -> None:
    right = parts.objective
    parts.objective = lambda model, batch: right(model, replace(batch, targets=batch.tokens))


# mode


@bug(
    "train-mode-never-set",
    "the trainer never calls model.train()",
    caught_by=(MODE,),
    source="https://github.com/MILVLG/mcan-vqa/issues/26",
)
def train_mode_never_set(parts: SimpleNamespace) -> None:
    override(parts, train_mode=lambda self: None)


@bug(
    "train-mode-never-restored",
    "model.train() is called once, before the first step: an evaluation ends it for good",
    caught_by=(MODE,),
    source="https://github.com/ThilinaRajapakse/simpletransformers/issues/941",
)
def train_mode_never_restored(parts: SimpleNamespace) -> None:
    def train_mode(self):
        if self.steps_done == 0:
            self.right.train_mode(self)

    def evaluate(self, examples):
        loss = self.right.evaluate(self, examples)
        self.model.eval()
        return loss

    override(parts, train_mode=train_mode, evaluate=evaluate)


# the optimizer


def rebuilt(parts: SimpleNamespace, change: Callable[[Any], None]) -> None:
    """A trainer whose optimizer is changed once it is built."""

    def init(self, *args, **kwargs):
        self.right.__init__(self, *args, **kwargs)
        change(self)

    override(parts, __init__=init)


@bug(
    "optimizer-misses-embeddings",
    "a filter by name leaves the embeddings out of the optimizer",
    caught_by=(OWNS, MOVES),
    source="https://github.com/ooples/AiDotNet/pull/1210",
)
def optimizer_misses_embeddings(parts: SimpleNamespace) -> None:
    def drop(self):
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in tables]

    rebuilt(parts, drop)


@bug(
    "optimizer-holds-stale-params",
    "the optimizer was built before a parameter was replaced, and still moves the old one",
    caught_by=(OWNS, MOVES),
    source="https://github.com/CodefyUI/CodefyUI/pull/147",
)
def optimizer_holds_stale_params(parts: SimpleNamespace) -> None:
    def replace(self):
        block = self.model.blocks[0].attention.output
        block.weight = nn.Parameter(block.weight.detach().clone())

    rebuilt(parts, replace)


@bug("optimizer-holds-twice", "tied weights are handed over twice and moved twice", caught_by=(OWNS,))
def optimizer_holds_twice(parts: SimpleNamespace) -> None:
    def repeat(self):
        group = self.optimizer.param_groups[-1]
        group["params"] = [*group["params"], self.model.embedding.weight]

    rebuilt(parts, repeat)


@bug("optimizer-moves-frozen", "frozen parameters are unfrozen before training", caught_by=(MOVES,))
def optimizer_moves_frozen(parts: SimpleNamespace) -> None:
    def init(self, model, *args, **kwargs):
        model.requires_grad_(True)
        self.right.__init__(self, model, *args, **kwargs)

    override(parts, __init__=init)


@bug(
    "norm-alias-in-decay-group",
    "norms are told by isinstance(LayerNorm), and RMSNorm is none: its gains decay",
    caught_by=(DECAY,),
    source="https://github.com/bigscience-workshop/Megatron-DeepSpeed/pull/262",
    norm="rms",
)
def norm_alias_in_decay_group(parts: SimpleNamespace) -> None:
    def by_class(self):
        aliases = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.RMSNorm)}
        decaying, lasting = self.optimizer.param_groups
        decaying["params"] += [p for p in lasting["params"] if id(p) in aliases]
        lasting["params"] = [p for p in lasting["params"] if id(p) not in aliases]

    rebuilt(parts, by_class)


@bug(
    "decay-on-everything",
    "weight decay goes to the optimizer as a whole: norms and biases shrink",
    caught_by=(DECAY,),
)
def decay_on_everything(parts: SimpleNamespace) -> None:
    def all_decay(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay

    rebuilt(parts, all_decay)


@bug("decay-twice", "weights decay in the optimizer and again by hand", caught_by=(DECAY,))
def decay_twice(parts: SimpleNamespace) -> None:
    def tick(self):
        self.right.tick(self)
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])

    override(parts, tick=tick)


@bug(
    "scheduler-per-microbatch",
    "the schedule ticks once a micro-batch: it is over too soon",
    caught_by=(RATE,),
    source="https://github.com/huggingface/accelerate/pull/999",
)
def scheduler_per_microbatch(parts: SimpleNamespace) -> None:
    def backward(self, part, weight):
        self.ticks = getattr(self, "ticks", -1) + 1
        return self.right.backward(self, part, weight)

    override(parts, backward=backward, learning_rate=lambda self, done: self.right.learning_rate(self, self.ticks))


@bug(
    "scheduler-off-by-one",
    "the schedule ticks before the optimizer steps: the first rate is skipped",
    caught_by=(RATE,),
    source="https://github.com/lonePatient/BERT-NER-Pytorch/issues/33",
)
def scheduler_off_by_one(parts: SimpleNamespace) -> None:
    override(parts, learning_rate=lambda self, done: self.right.learning_rate(self, done + 1))


@bug("scheduler-never-ticks", "the count of steps that the schedule reads never grows", caught_by=(RATE,))
def scheduler_never_ticks(parts: SimpleNamespace) -> None:
    override(parts, learning_rate=lambda self, done: self.right.learning_rate(self, 0))


# precision


@bug(
    "bf16-master-weights",
    "the weights themselves are bfloat16: updates below 1/256 of a weight are lost",
    caught_by=(SMALL,),
    source="https://github.com/pytorch/ao/pull/1124",
)
def bf16_master_weights(parts: SimpleNamespace) -> None:
    def init(self, model, data, config, *args, **kwargs):
        low = config.precision == "bfloat16"
        self.right.__init__(self, model.bfloat16() if low else model, data, config, *args, **kwargs)

    override(parts, __init__=init)


@bug(
    "norm-weights-frozen-by-dtype",
    "norm gains are kept in bfloat16, where 1 + 1e-3 is 1: they never move",
    caught_by=(SMALL,),
    source="https://github.com/fla-org/flash-linear-attention/pull/676",
)
def norm_weights_frozen_by_dtype(parts: SimpleNamespace) -> None:
    def tick(self):
        self.right.tick(self)
        if self.config.precision == "bfloat16":
            with torch.no_grad():
                for module in self.model.modules():
                    if isinstance(module, nn.LayerNorm):
                        module.weight.copy_(module.weight.bfloat16())

    override(parts, tick=tick)
