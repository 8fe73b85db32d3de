"""Mistakes in the data and around it: batches, their order, evaluation, seeds and random states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch

from ...transformer import random_state
from ...transformer.data import DataOrder
from ...transformer.loss import loss_mask
from . import bug
from .trainer import override

ROW = "check_data.check_a_row_is_its_sequence"
NEXT = "check_data.check_a_target_is_the_next_token"
MASK = "check_data.check_the_loss_mask_drops_what_was_asked"
END = "check_data.check_an_end_token_counts_though_it_pads"
EPOCH = "check_data.check_an_epoch_has_every_example_once"
ORDER = "check_data.check_the_order_changes_with_the_epoch"
SEED = "check_data.check_a_seed_decides_a_training"
STREAMS = "check_data.check_processes_draw_from_streams_of_their_own"
WEIGHS = "check_evaluation.check_evaluation_weighs_every_target_alike"
DROPOUT = "check_evaluation.check_evaluation_is_without_dropout"
TRACE = "check_evaluation.check_evaluation_leaves_no_trace"
LOOKING = "check_evaluation.check_looking_does_not_change_the_training"
MODE = "check_training.check_a_step_is_made_in_train_mode"


# batches


def batches(parts: SimpleNamespace, change: Callable) -> None:
    """`change(batch, skip)` makes a wrong batch of a right one."""
    right = parts.pad_batch

    def pad_batch(sequences, skip=0, **options):
        return change(right(sequences, skip, **options), skip)

    parts.pad_batch = pad_batch


@bug(
    "dataset-target-off-by-one",
    "targets are the tokens read, not those that follow",
    caught_by=(NEXT, "check_training.check_a_uniform_stream_is_never_learned"),
    source="https://github.com/tamangmilan/llama3/pull/1",
)
def dataset_target_off_by_one(parts: SimpleNamespace) -> None:
    batches(parts, lambda batch, skip: replace(batch, targets=batch.tokens.clone()))


@bug(
    "bptt-tail-mis-split",
    "the last tokens of the rows are dealt out over the rows",
    caught_by=(ROW,),
    source="https://github.com/dmlc/gluon-nlp/pull/243",
)
def bptt_tail_mis_split(parts: SimpleNamespace) -> None:
    def deal(batch, skip):
        tokens = batch.tokens.clone()
        tokens[:, -2:] = tokens[:, -2:].T.reshape(-1).view(-1, 2)
        return replace(batch, tokens=tokens)

    batches(parts, deal)


@bug(
    "padding-counted",
    "the loss mask forgets the padding: pads are learned as if they were text",
    caught_by=(MASK,),
    source="https://github.com/lucidrains/DALLE-pytorch/issues/57",
)
def padding_counted(parts: SimpleNamespace) -> None:
    batches(parts, lambda batch, skip: replace(batch, loss_mask=loss_mask(torch.ones_like(batch.mask), skip)))


@bug("loss-mask-skips-others", "target 0 is trained, and one after those to be skipped is not", caught_by=(MASK,))
def loss_mask_skips_others(parts: SimpleNamespace) -> None:
    def counted_from_the_begin_token(batch, skip):
        wrong = batch.mask & ((batch.mask.cumsum(1) > skip + 1) | (batch.mask.cumsum(1) == 1))
        return replace(batch, loss_mask=wrong if skip else batch.loss_mask)

    batches(parts, counted_from_the_begin_token)


@bug(
    "loss-mask-by-column",
    "skipped targets are counted by column: padding on the left uses them up",
    caught_by=(MASK,),
)
def loss_mask_by_column(parts: SimpleNamespace) -> None:
    def by_column(batch, skip):
        return replace(batch, loss_mask=batch.mask & (torch.arange(batch.mask.shape[1]) >= skip))

    batches(parts, by_column)


@bug(
    "eos-masked-because-pad-is-eos",
    "targets equal to the pad carry no loss, and the end token pads: no text ever ends",
    caught_by=(END,),
    source="https://github.com/huggingface/transformers/issues/23530",
)
def eos_masked_because_pad_is_eos(parts: SimpleNamespace) -> None:
    right = parts.pad_batch

    def pad_batch(sequences, skip=0, *, pad=0, **options):
        batch = right(sequences, skip, pad=pad, **options)
        return replace(batch, loss_mask=batch.loss_mask & (batch.targets != pad))

    parts.pad_batch = pad_batch


# the order of examples


def ordered(parts: SimpleNamespace, window: Callable) -> None:
    """`window(order, size)` draws the indices of a step from a DataOrder."""
    override(parts, window=lambda self: [self.data.train[i] for i in window(self.order, self.config.batch_size)])


@bug(
    "data-same-shuffle-every-epoch",
    "the shuffle is seeded anew every epoch",
    caught_by=(ORDER,),
    source="https://github.com/ByteDance-Seed/VeOmni/pull/1075",
)
def data_same_shuffle_every_epoch(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        order.generator.manual_seed(0)
        return order.window(size)

    ordered(parts, window)


@bug("data-sampled-with-replacement", "examples are drawn with replacement: some are never seen", caught_by=(EPOCH,))
def data_sampled_with_replacement(parts: SimpleNamespace) -> None:
    ordered(parts, lambda order, size: torch.randint(len(order.epoch), (size,), generator=order.generator).tolist())


@bug(
    "data-last-window-dropped",
    "an epoch ends when no full window is left: its last examples are lost",
    caught_by=(EPOCH,),
)
def data_last_window_dropped(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        if order.position + size > len(order.epoch):
            order.position = len(order.epoch)
        return order.window(size)

    ordered(parts, window)


@bug(
    "data-window-stride-off-by-one",
    "windows advance by one less than they hold: their border is trained twice",
    caught_by=(EPOCH,),
    source="https://github.com/kingoflolz/mesh-transformer-jax/issues/175",
)
def data_window_stride_off_by_one(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        found = order.window(size)
        order.position -= int(order.position < len(order.epoch))
        return found

    ordered(parts, window)


@bug(
    "data-validation-leak",
    "the validation split is part of what is trained on",
    caught_by=(EPOCH,),
    source="https://github.com/openai/parameter-golf/issues/2127",
)
def data_validation_leak(parts: SimpleNamespace) -> None:
    def init(self, model, data, *args, **kwargs):
        data.train = [*data.train, *data.validation]
        self.right.__init__(self, model, data, *args, **kwargs)

    override(parts, __init__=init)


# seeds and random states


@bug("training-is-not-seeded", "dropout draws from whatever random state the caller left", caught_by=(SEED,))
def training_is_not_seeded(parts: SimpleNamespace) -> None:
    override(parts, own_random_state=lambda self: nullcontext())


@bug("seed-is-ignored", "order and dropout begin from a fixed seed, whatever the configuration says", caught_by=(SEED,))
def seed_is_ignored(parts: SimpleNamespace) -> None:
    def init(self, model, data, config, *args, **kwargs):
        self.right.__init__(self, model, data, replace(config, seed=1337), *args, **kwargs)

    override(parts, __init__=init)


@bug(
    "dataloader-workers-same-seed",
    "every process seeds its random state alike: all draw the same noise",
    caught_by=(STREAMS,),
    source="https://github.com/pytorch/pytorch/issues/5059",
)
def dataloader_workers_same_seed(parts: SimpleNamespace) -> None:
    def init(self, *args, **kwargs):
        self.right.__init__(self, *args, **kwargs)
        self.random = random_state.seeded(self.config.seed, self.device)

    override(parts, __init__=init)


@bug(
    "sampling-reseeds-training",
    "an evaluation begins with manual_seed: dropout draws the same noise after each",
    caught_by=(LOOKING,),
    source="https://github.com/huggingface/diffusers/issues/7991",
)
def sampling_reseeds_training(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        self.random = random_state.seeded(self.config.seed, self.device)
        return self.right.evaluate(self, examples)

    override(parts, evaluate=evaluate)


@bug("evaluation-draws", "an evaluation seeds the global random state and leaves it so", caught_by=(TRACE,))
def evaluation_draws(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        torch.manual_seed(0)
        return self.right.evaluate(self, examples)

    override(parts, evaluate=evaluate)


# evaluation


def summed(self, examples) -> list[tuple[float, float]]:
    """Sum and count of each batch, in eval mode."""
    size = self.config.batch_size
    with torch.no_grad(), self.eval_mode(), random_state.preserved(self.device):
        found = [self.compute(self.model, examples[i : i + size]) for i in range(0, len(examples), size)]
    return [(float(total), float(count)) for total, count in found]


@bug(
    "eval-mean-of-batch-means",
    "the means of the batches are averaged: targets in short batches count more",
    caught_by=(WEIGHS,),
    source="https://github.com/pytorch/torchtitan/pull/4167",
)
def eval_mean_of_batch_means(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        means = [total / count for total, count in summed(self, examples)]
        return sum(means) / len(means)

    override(parts, evaluate=evaluate)


@bug("eval-only-last-batch", "the loss is overwritten in the loop: only the last batch counts", caught_by=(WEIGHS,))
def eval_only_last_batch(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        total, count = summed(self, examples)[-1]
        return total / count

    override(parts, evaluate=evaluate)


@bug(
    "eval-denominator-off-by-one",
    "the sum is divided by tokens, not by targets: one too many for each example",
    caught_by=(WEIGHS,),
    source="https://github.com/facebookresearch/colorlessgreenRNNs/pull/4",
)
def eval_denominator_off_by_one(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        return sum(total for total, _ in summed(self, examples)) / sum(map(len, examples))

    override(parts, evaluate=evaluate)


@bug(
    "eval-with-dropout",
    "the model is not put in eval mode to be evaluated",
    caught_by=(DROPOUT,),
    source="https://github.com/meta-pytorch/torchtune/pull/1049",
)
def eval_with_dropout(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        self.model.train()
        return self.right.evaluate(self, examples)

    override(parts, evaluate=evaluate, eval_mode=lambda self: nullcontext())


@bug(
    "eval-not-restored",
    "an evaluation leaves the model in eval mode",
    caught_by=(TRACE,),
    source="https://github.com/huggingface/lerobot/issues/3668",
)
def eval_not_restored(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        loss = self.right.evaluate(self, examples)
        self.model.eval()
        return loss

    override(parts, evaluate=evaluate)


@bug("evaluate-trains", "an evaluation makes an optimizer step", caught_by=(TRACE,))
def evaluate_trains(parts: SimpleNamespace) -> None:
    def evaluate(self, examples):
        loss = self.right.evaluate(self, examples)
        self.optimizer.step()
        return loss

    override(parts, evaluate=evaluate)
