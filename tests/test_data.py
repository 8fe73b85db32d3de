"""The data: what a tokenizer keeps, how sequences become batches, and which examples come when."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_checks.transformer.data import CharacterTokenizer, DataOrder, SentenceTask, pad_batch

thorough = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# the tokenizer


@thorough
@given(st.text(min_size=1))
def test_a_text_comes_back_from_its_tokens(text):
    tokenizer = CharacterTokenizer(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and set(ids) == set(range(1, tokenizer.vocab_size))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.begin, *ids]) == text


def test_a_tokenizer_comes_back_from_its_dict():
    tokenizer = CharacterTokenizer("machine")
    again = CharacterTokenizer.from_dict(tokenizer.to_dict())
    assert again.encode("machine") == tokenizer.encode("machine") and again.vocab_size == tokenizer.vocab_size
    with pytest.raises(ValueError, match="'bytes'"):
        CharacterTokenizer.from_dict({"kind": "bytes"})


def test_an_unknown_character_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"'z' at position 2 of 'luz'"):
        CharacterTokenizer("love u").encode("luz")


@pytest.mark.parametrize("i", [-1, 5])
def test_an_unknown_token_id_is_named(i):
    with pytest.raises(ValueError, match=rf"id {i}: .* 0 to 4"):
        CharacterTokenizer("love").decode([1, i])


# the sentence


def test_the_sentence_task_is_that_of_the_homework():
    task = SentenceTask()
    assert (task.tokenizer.vocab_size, task.block_size) == (15, 23)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [100, 10, 10]
    assert {*task.train, *task.validation, *task.test} == {"I love machine learning"}


def test_a_batch_reads_begin_and_all_but_the_last_and_predicts_every_character():
    task = SentenceTask()
    batch = task.batch(task.train[:3])
    ids = torch.tensor(task.tokenizer.encode(task.sentence))
    assert batch.tokens.shape == (3, task.block_size)
    assert batch.tokens[0, 0] == task.tokenizer.begin and batch.tokens[0, 1:].equal(ids[:-1])
    assert batch.targets[2].equal(ids)
    assert batch.mask.all() and batch.loss_mask.all() and not batch.padded


def test_skipped_targets_are_the_first_characters():
    task = SentenceTask(skip=3)
    batch = task.batch(task.train[:1])
    assert task.tokenizer.decode(batch.targets[~batch.loss_mask]) == "I l"
    assert task.tokenizer.decode(batch.targets[batch.loss_mask]) == "ove machine learning"


@pytest.mark.parametrize("skip", [-1, 5, 6])
def test_a_task_that_teaches_nothing_is_refused(skip):
    with pytest.raises(ValueError, match=str(skip)):
        SentenceTask("hello", skip=skip)


# padded batches

sequences = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=8), min_size=1, max_size=6)


@thorough
@given(sequences, st.integers(0, 4), st.sampled_from(["right", "left"]), st.integers(0, 9))
def test_every_pair_of_neighbours_is_a_token_and_its_target_once_and_in_order(rows, skip, side, pad):
    batch = pad_batch(rows, skip, pad=pad, side=side)
    T = max(map(len, rows)) - 1
    assert all(x.shape == (len(rows), T) for x in (batch.tokens, batch.targets, batch.mask, batch.loss_mask))
    for b, row in enumerate(rows):
        real = batch.mask[b]
        pairs = list(zip(batch.tokens[b, real].tolist(), batch.targets[b, real].tolist(), strict=True))
        assert pairs == list(pairwise(row))
        assert batch.targets[b, batch.loss_mask[b]].tolist() == row[1 + skip :]
        assert (batch.tokens[b, ~real] == pad).all() and (batch.targets[b, ~real] == pad).all()
        end = real[-1] if side == "left" else real[0]
        assert end, "padding stands on one side only"
    assert batch.padded == (not batch.mask.all())


def test_moving_a_batch_keeps_all_of_it():
    batch = pad_batch([[0, 1], [0, 2, 3]]).to("meta")
    tensors = (batch.tokens, batch.targets, batch.mask, batch.loss_mask)
    assert all(x.is_meta and x.shape == (2, 2) for x in tensors) and batch.padded


@pytest.mark.parametrize(("rows", "said"), [([], "none"), ([[0, 1], [0]], "got 1")])
def test_sequences_without_a_target_are_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        pad_batch(rows)


# the order of training


def epoch_windows(order: DataOrder, size: int) -> list[list[int]]:
    windows = []
    while sum(map(len, windows)) < len(order.epoch):
        windows.append(order.window(size))
    return windows


@thorough
@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 99))
def test_every_epoch_has_every_example_once_and_the_odd_rest_is_a_window(examples, size, seed):
    order = DataOrder(examples, seed)
    for _ in range(3):
        windows = epoch_windows(order, size)
        assert sorted(i for window in windows for i in window) == list(range(examples))
        assert [len(w) for w in windows] == [size] * (examples // size) + [examples % size] * bool(examples % size)


def test_epochs_and_seeds_differ_and_equal_seeds_do_not():
    first, second = epoch_windows(order := DataOrder(20, seed=0), 4), epoch_windows(order, 4)
    assert first != second
    assert epoch_windows(DataOrder(20, seed=0), 4) == first
    assert epoch_windows(DataOrder(20, seed=1), 4) != first


def test_nobody_else_disturbs_the_order_nor_it_them():
    expected = epoch_windows(DataOrder(20, seed=3), 4)
    before = torch.get_rng_state()
    order = DataOrder(20, seed=3)
    windows = [order.window(4)]
    assert torch.get_rng_state().equal(before)
    for _ in range(4):
        torch.rand(7)
        torch.manual_seed(0)
        windows.append(order.window(4))
    assert windows == expected


@thorough
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 30))
def test_the_order_goes_on_from_its_state(examples, size, done):
    order = DataOrder(examples, seed=5)
    for _ in range(done):
        order.window(size)
    state = order.state_dict()
    rest = [order.window(size) for _ in range(10)]
    again = DataOrder(examples, seed=6)
    again.load_state_dict(state)
    assert [again.window(size) for _ in range(10)] == rest


def test_other_data_than_the_checkpoints_is_refused():
    with pytest.raises(ValueError, match=r"8 examples.* 7"):
        DataOrder(7, seed=0).load_state_dict(DataOrder(8, seed=0).state_dict())
    with pytest.raises(ValueError, match="no examples"):
        DataOrder(0, seed=0)
