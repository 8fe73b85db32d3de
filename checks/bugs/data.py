"""Wrong data: targets and loss masks of a batch, and the order of the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.data import Batch, DataOrder
from ...transformer.loss import loss_mask
from ...transformer.trainer import Trainer
from ..check_data import (
    check_a_row_is_its_sequence,
    check_a_target_is_the_next_token,
    check_an_end_token_counts_though_it_pads,
    check_an_epoch_has_every_example_once,
    check_batch_and_loss_train_on_the_next_token,
    check_the_loss_mask_drops_what_was_asked,
    check_the_order_changes_with_the_epoch,
)
from ..check_training import check_a_uniform_stream_is_never_learned
from . import bug


def batches(parts: SimpleNamespace, change: Callable[[Batch, int], Batch]) -> None:
    """`change(batch, skip)` makes a wrong batch of a right one."""
    right = parts.pad_batch

    def pad_batch(sequences: Sequence[Sequence[int]], skip: int = 0, **options: Any) -> Batch:
        return change(right(sequences, skip, **options), skip)

    parts.pad_batch = pad_batch


# -- batches


@bug(
    "targets are the tokens just read instead of the next ones",
    check_a_target_is_the_next_token,
    check_batch_and_loss_train_on_the_next_token,
    check_a_uniform_stream_is_never_learned,
    source="https://github.com/tamangmilan/llama3/pull/1",
)
def dataset_target_off_by_one(parts: SimpleNamespace) -> None:
    batches(parts, lambda batch, skip: replace(batch, targets=batch.tokens.clone()))


@bug("the batch shifts the targets and the loss shifts them again", check_batch_and_loss_train_on_the_next_token)
def batch_and_loss_both_shift(parts: SimpleNamespace) -> None:
    right = parts.loss

    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        value: Tensor = right(logits[:, :-1], targets[:, 1:], None if mask is None else mask[:, 1:])
        return value

    parts.loss, parts.declares = loss, {**parts.declares, "shift": 1}


@bug(
    "the last tokens of the rows are exchanged between rows",
    check_a_row_is_its_sequence,
    source="https://github.com/dmlc/gluon-nlp/pull/243",
)
def bptt_tail_mis_split(parts: SimpleNamespace) -> None:
    def deal(batch: Batch, skip: int) -> Batch:
        tokens = batch.tokens.clone()
        tokens[:, -2:] = tokens[:, -2:].T.reshape(-1).view(-1, 2)
        return replace(batch, tokens=tokens)

    batches(parts, deal)


@bug(
    "the loss mask includes padding: it is trained like text",
    check_the_loss_mask_drops_what_was_asked,
    source="https://github.com/lucidrains/DALLE-pytorch/issues/57",
)
def padding_counted(parts: SimpleNamespace) -> None:
    batches(parts, lambda batch, skip: replace(batch, loss_mask=loss_mask(torch.ones_like(batch.mask), skip)))


@bug("the loss mask skips the wrong targets: not the first, but a later one", check_the_loss_mask_drops_what_was_asked)
def loss_mask_skips_others(parts: SimpleNamespace) -> None:
    def counted_from_the_begin_token(batch: Batch, skip: int) -> Batch:
        wrong = batch.mask & ((batch.mask.cumsum(1) > skip + 1) | (batch.mask.cumsum(1) == 1))
        return replace(batch, loss_mask=wrong if skip else batch.loss_mask)

    batches(parts, counted_from_the_begin_token)


@bug("skipped targets are counted by column: left padding uses them up", check_the_loss_mask_drops_what_was_asked)
def loss_mask_by_column(parts: SimpleNamespace) -> None:
    def by_column(batch: Batch, skip: int) -> Batch:
        return replace(batch, loss_mask=batch.mask & (torch.arange(batch.mask.shape[1]) >= skip))

    batches(parts, by_column)


@bug(
    "targets equal to the pad id are masked, and so is the end token, whose id is the same",
    check_an_end_token_counts_though_it_pads,
    source="https://github.com/huggingface/transformers/issues/23530",
)
def eos_masked_because_pad_is_eos(parts: SimpleNamespace) -> None:
    right = parts.pad_batch

    def pad_batch(sequences: Sequence[Sequence[int]], skip: int = 0, *, pad: int = 0, **options: Any) -> Batch:
        batch: Batch = right(sequences, skip, pad=pad, **options)
        return replace(batch, loss_mask=batch.loss_mask & (batch.targets != pad))

    parts.pad_batch = pad_batch


# -- the order of examples


def ordered(parts: SimpleNamespace, window: Callable[[DataOrder, int], list[int]]) -> None:
    """`window(order, size)` draws the indices of a step from a DataOrder."""

    class Ordered(Trainer):
        def window(self) -> list[Any]:
            return [self.data.train[i] for i in window(self.order, self.config.batch_size)]

    parts.trainer = Ordered


@bug(
    "every epoch is shuffled with the same seed",
    check_the_order_changes_with_the_epoch,
    source="https://github.com/ByteDance-Seed/VeOmni/pull/1075",
)
def data_same_shuffle_every_epoch(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        order.generator.manual_seed(0)
        return order.window(size)

    ordered(parts, window)


@bug("examples are drawn with replacement: an epoch misses some", check_an_epoch_has_every_example_once)
def data_sampled_with_replacement(parts: SimpleNamespace) -> None:
    ordered(parts, lambda order, size: torch.randint(len(order.epoch), (size,), generator=order.generator).tolist())


@bug("the last examples of an epoch are dropped where they do not fill a batch", check_an_epoch_has_every_example_once)
def data_last_window_dropped(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        if order.position + size > len(order.epoch):
            order.position = len(order.epoch)
        return order.window(size)

    ordered(parts, window)


@bug(
    "the stride is off by one: the last example of a batch is the first of the next",
    check_an_epoch_has_every_example_once,
    source="https://github.com/kingoflolz/mesh-transformer-jax/issues/175",
)
def data_window_stride_off_by_one(parts: SimpleNamespace) -> None:
    def window(order: DataOrder, size: int) -> list[int]:
        found = order.window(size)
        order.position -= int(order.position < len(order.epoch))
        return found

    ordered(parts, window)


@bug(
    "the validation set is part of the training set",
    check_an_epoch_has_every_example_once,
    source="https://github.com/openai/parameter-golf/issues/2127",
)
def data_validation_leak(parts: SimpleNamespace) -> None:
    class Leaks(Trainer):
        def __init__(self, model: nn.Module, data: Any, *args: Any, **kwargs: Any) -> None:
            data.train = [*data.train, *data.validation]
            super().__init__(model, data, *args, **kwargs)

    parts.trainer = Leaks
