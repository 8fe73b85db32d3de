"""The trainer: every part of a step against what it should be, and evaluation; many steps are in test_training.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_trainer import PLAIN, SMALL, Rows, assert_equal, trainer, weights
from transformer_checks.transformer.data import pad_batch
from transformer_checks.transformer.loss import next_token_loss
from transformer_checks.transformer.model import ModelConfig, Transformer, gpt2, llama
from transformer_checks.transformer.optimizer import decay_groups
from transformer_checks.transformer.trainer import Trainer, next_token_objective

thorough = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def gradient_norm(gradients: dict) -> float:
    return math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))


# --- one step, against a step written out by hand


def step_by_hand(config, model, rows, skip, moments, step):
    """One step of Adam or AdamW in NumPy, from the papers' formulas, on the mean loss over all targets."""
    model.zero_grad()
    batch = pad_batch(rows, skip)
    next_token_loss(model(batch.tokens, batch.mask), batch.targets, batch.loss_mask).backward()
    parameters = dict(model.named_parameters())
    g = {name: p.grad.numpy().copy() for name, p in parameters.items()}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    rate = config.learning_rate * min(1, step / max(1, config.warmup_steps))
    for name, p in parameters.items():
        w = p.detach().numpy()
        if config.clip_norm is not None and norm > config.clip_norm:
            g[name] *= config.clip_norm / norm
        decay = config.weight_decay if p.dim() == 2 and "embedding" not in name and "table" not in name else 0
        if config.optimizer == "adam":
            g[name] += decay * w
        m, v = moments.setdefault(name, (0, 0))
        m = config.beta1 * m + (1 - config.beta1) * g[name]
        v = config.beta2 * v + (1 - config.beta2) * g[name] ** 2
        moments[name] = (m, v)
        update = (m / (1 - config.beta1**step)) / (np.sqrt(v / (1 - config.beta2**step)) + config.eps)
        if config.optimizer == "adamw":
            update = update + decay * w
        p.data -= torch.from_numpy(rate * update)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_steps_equal_those_written_by_hand(optimizer, clip_norm, micro_batch_size):
    config = replace(
        PLAIN, optimizer=optimizer, clip_norm=clip_norm, micro_batch_size=micro_batch_size, warmup_steps=3,
        weight_decay=0.1, eps=1e-4,
    )  # fmt: skip
    ours, by_hand, moments = trainer(config), trainer(config), {}
    for step in range(1, 6):
        rows = by_hand.window()
        step_by_hand(config, by_hand.model, rows, 1, moments, step)
        ours.step()
        # Rounding of 1e-16 grows by up to 1/eps = 1e4 a step; torch's clipping adds 1e-6 to the norm.
        assert_equal(weights(ours), weights(by_hand), tolerance=1e-7 if clip_norm else 1e-12)


def test_step_returns_the_mean_loss_of_the_window_before_it():
    ours, other = trainer(), trainer()
    batch = other.data.batch(other.window())
    expected = next_token_loss(other.model(batch.tokens, batch.mask), batch.targets, batch.loss_mask)
    assert ours.step().item() == pytest.approx(expected.item(), rel=1e-12)


# --- accumulation


@thorough
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=7), size=st.integers(1, 7), skip=st.integers(0, 3))
def test_micro_batches_of_any_size_give_the_gradient_of_the_full_batch(lengths, size, skip):
    data = Rows(lengths, skip)
    whole = trainer(replace(PLAIN, batch_size=7), data=data)
    parts = trainer(replace(PLAIN, batch_size=7, micro_batch_size=size), data=data)
    losses = [whole.step().item(), parts.step().item()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert_equal(gradients(whole), gradients(parts), tolerance=1e-14)


def test_the_means_of_ragged_micro_batches_would_give_another_gradient():
    """Else the test above could not fail."""
    data = Rows((2, 9, 9), skip=0)
    whole = trainer(replace(PLAIN, batch_size=3), data=data)
    whole.step()
    means = trainer(data=data).model
    for row in data.train:
        batch = data.batch([row])
        (next_token_loss(means(batch.tokens), batch.targets, batch.loss_mask) / 3).backward()
    difference = [(p.grad - gradients(whole)[name]).abs().max() for name, p in means.named_parameters()]
    assert max(difference) > 1e-3


def test_every_example_of_an_epoch_is_trained_on_and_the_odd_last_window_is_stepped():
    ours = trainer(replace(PLAIN, batch_size=3))
    windows = []
    window = ours.window
    ours.window = lambda: windows.append(window()) or windows[-1]
    before = weights(ours)
    for _ in range(2):
        ours.step()
    between = weights(ours)
    ours.step()
    assert [len(w) for w in windows] == [3, 3, 1]
    assert sorted(sum(windows, start=[])) == sorted(ours.data.train)  # noqa: RUF017, three short lists
    assert not before["norm.weight"].equal(between["norm.weight"])
    assert not between["norm.weight"].equal(weights(ours)["norm.weight"])


def test_a_window_in_which_nothing_carries_loss_leaves_the_weights_finite_and_still():
    ours = trainer(data=Rows((2, 2, 2), skip=1))
    before = weights(ours)
    assert ours.step().item() == 0
    assert_equal(weights(ours), before)


def test_gradients_from_before_do_not_count():
    clean, stale = trainer(), trainer()
    for parameter in stale.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    for _ in range(3):
        clean.step()
        stale.step()
    assert_equal(weights(clean), weights(stale))


# --- clipping, decay, the learning rate


def test_clipping_shortens_a_long_gradient_and_keeps_its_direction():
    free, clipped = trainer(), trainer(replace(PLAIN, clip_norm=0.01))
    free.step()
    clipped.step()
    norm = gradient_norm(gradients(free))
    assert norm > 0.01 and clipped.gradient_norm.item() == pytest.approx(norm)
    assert gradient_norm(gradients(clipped)) == pytest.approx(0.01, rel=1e-4)
    scaled = {name: g * 0.01 / norm for name, g in gradients(free).items()}
    assert_equal(gradients(clipped), scaled, tolerance=1e-6)


def test_clipping_leaves_a_short_gradient_alone():
    free, clipped = trainer(), trainer(replace(PLAIN, clip_norm=1e6))
    free.step()
    clipped.step()
    assert_equal(gradients(free), gradients(clipped))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [gpt2, llama])
def test_matrices_decay_but_neither_vectors_nor_embeddings(family, tied):
    model = Transformer(family(**SMALL, tied=tied))
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, lasting = ([names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.1))
    assert sorted(decaying + lasting) == sorted(names.values())
    assert all(name.split(".")[-2] in ("qkv", "output", "input", "gate", "head") for name in decaying)
    assert all(name.endswith("weight") for name in decaying)
    assert {"embedding.weight"} <= set(lasting) and ("head.weight" in decaying) == (not tied)
    assert [group["weight_decay"] for group in decay_groups(model, 0.1)] == [0.1, 0.0]


def test_frozen_parameters_stay_and_a_model_without_others_is_refused():
    ours = trainer()
    ours.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        trainer(model=ours.model)
    ours.model.head.weight.requires_grad_(True)
    again = trainer(replace(PLAIN, optimizer="adamw", weight_decay=1.0, clip_norm=1.0), model=ours.model)
    before = weights(again)
    again.step()
    changed = {name for name, w in weights(again).items() if not w.equal(before[name])}
    assert changed == {"embedding.weight"}  # the head is tied to it


def rates(config, steps, **given) -> list[float]:
    ours = trainer(config, **given)
    found = []
    for _ in range(steps):
        ours.step()
        found.append({group["lr"] for group in ours.optimizer.param_groups})
    assert all(len(rate) == 1 for rate in found)
    return [rate.pop() for rate in found]


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_the_rate_warms_up_from_above_zero_and_ticks_once_a_step(micro_batch_size):
    config = replace(PLAIN, warmup_steps=4, learning_rate=0.08, micro_batch_size=micro_batch_size)
    assert rates(config, 6) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.08, 0.08])


def test_the_cosine_falls_from_the_rate_to_its_minimum_at_the_last_step():
    config = replace(PLAIN, steps=7, warmup_steps=2, schedule="cosine", learning_rate=0.09, min_learning_rate=0.01)
    half = math.sqrt(0.5)
    cosine = [1, half, 0, -half, -1]
    assert rates(config, 7) == pytest.approx([0.045, 0.09, *(0.05 + 0.04 * c for c in cosine)])


# --- modes, randomness, precision


class Noticing(nn.Module):
    """A model with dropout that remembers in which mode and precision it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout, self.head = nn.Embedding(9, 8), nn.Dropout(0.5), nn.Linear(8, 9)
        self.frozen = nn.Dropout(0.5).eval()
        self.modes: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, tokens, mask=None):
        self.modes.append(self.training)
        logits = self.head(self.frozen(self.dropout(self.embedding(tokens))))
        self.dtypes.append(logits.dtype)
        return logits


def noticing(config=PLAIN, **given):
    torch.manual_seed(0)
    return trainer(config, model=Noticing(), **given)


def test_steps_are_in_train_mode_whatever_came_before_and_evaluation_is_not():
    ours = noticing()
    ours.model.eval()
    ours.step()
    ours.evaluate(ours.data.validation)
    ours.step()
    assert ours.model.modes == [True, False, True]


def test_evaluation_leaves_modes_weights_gradients_and_random_states_as_they_were():
    ours = noticing()
    ours.step()
    ours.model.frozen.eval()
    modes = [module.training for module in ours.model.modules()]
    before, grads, outside, own = weights(ours), gradients(ours), torch.get_rng_state(), ours.random["cpu"]
    first = ours.evaluate(ours.data.validation)
    assert ours.evaluate(ours.data.validation) == first  # without dropout it is the same every time
    assert [module.training for module in ours.model.modules()] == modes
    assert_equal(weights(ours), before)
    assert_equal(gradients(ours), grads)
    assert torch.get_rng_state().equal(outside) and ours.random["cpu"].equal(own)


def test_a_model_that_draws_while_it_is_evaluated_leaves_the_random_state_too():
    def sampling(model, batch):
        total, count = next_token_objective(model, batch)
        return total + torch.rand(()), count

    ours = trainer(objective=sampling)
    outside = torch.get_rng_state()
    ours.evaluate(ours.data.validation)
    assert torch.get_rng_state().equal(outside)


def test_modes_come_back_when_evaluation_fails():
    ours = noticing()
    with pytest.raises(IndexError):
        ours.evaluate([[77, 0, 1]])
    assert ours.model.training


@thorough
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=7), size=st.integers(1, 4))
def test_evaluation_weighs_every_target_alike_however_it_is_split(lengths, size):
    data = Rows(lengths, skip=0)
    ours = trainer(replace(PLAIN, batch_size=size), data=data)
    batch = data.batch(data.train)
    expected = next_token_loss(ours.model(batch.tokens, batch.mask), batch.targets, batch.loss_mask)
    assert ours.evaluate(data.train) == pytest.approx(expected.item(), rel=1e-12)


def test_nothing_is_evaluated_on_nothing():
    with pytest.raises(ValueError, match="no examples"):
        trainer().evaluate([])


def test_training_neither_disturbs_the_callers_random_state_nor_is_disturbed_by_it():
    alone, among_others = noticing(), noticing()
    for _ in range(4):
        before = torch.get_rng_state()
        alone.step()
        assert torch.get_rng_state().equal(before)
    for i in range(4):
        torch.manual_seed(i)
        torch.rand(3)
        among_others.evaluate(among_others.data.validation)
        among_others.step()
    assert_equal(weights(alone), weights(among_others))


def test_the_seed_decides_and_dropout_is_not_the_same_every_step():
    def losses(seed):  # of the same row with the same weights: they differ by dropout alone
        ours = noticing(replace(PLAIN, learning_rate=1e-30, seed=seed), data=Rows((8,)))
        return [ours.step().item() for _ in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
    assert len(set(losses(0))) == 3


def test_bfloat16_is_of_the_computation_and_float32_of_weights_optimizer_and_loss():
    ours = noticing(replace(PLAIN, precision="bfloat16"))
    loss = ours.step()
    assert ours.model.dtypes == [torch.bfloat16] and loss.dtype == torch.float32
    state = [t for s in ours.optimizer.state.values() for t in s.values()]
    assert {t.dtype for t in (*ours.model.parameters(), *state)} == {torch.float32}


class Reads(TorchDispatchMode):
    """Counts the times that a number leaves its device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device():
    torch.manual_seed(0)
    ours = Trainer(Transformer(ModelConfig(**SMALL)), Rows(), replace(PLAIN, clip_norm=1.0, micro_batch_size=2))
    with Reads() as reads:
        for _ in range(3):
            ours.step()
        assert reads.count == 0
        ours.step().item()
        assert reads.count == 1


def test_a_foreign_model_trains_by_an_objective_of_its_own():
    class Points:
        train = validation = tuple((x, 3 * x + 1) for x in range(-3, 4))

        def batch(self, points):
            return torch.tensor(points, dtype=torch.float32)

    def squared_error(model, batch):
        return ((model(batch[:, :1]) - batch[:, 1:]) ** 2).sum(), torch.tensor(len(batch))

    config = replace(PLAIN, steps=2000, stop_loss=1e-6, learning_rate=0.05)
    ours = Trainer(nn.Linear(1, 1), Points(), config, squared_error)
    ours.train()
    assert ours.model.weight.item() == pytest.approx(3, abs=0.01) and ours.steps_done < 2000
