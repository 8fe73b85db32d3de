"""The trainer: every part of a step against what it should be, evaluation, many steps, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformer import checkpoint
from transformer.data import SentenceTask, pad_batch
from transformer.generation import generate
from transformer.loss import next_token_loss
from transformer.metrics import read_metrics
from transformer.model import ModelConfig, Transformer, gpt2, llama
from transformer.optimizer import decay_groups
from transformer.train_config import PUBLISHED, TrainConfig
from transformer.trainer import Diverged, Trainer, next_token_objective

SMALL = dict(vocab_size=9, block_size=8, n_embd=8, n_head=2)
PLAIN = TrainConfig(
    steps=6, stop_loss=None, batch_size=3, learning_rate=0.01, warmup_steps=0, clip_norm=None, beta2=0.95
)
thorough = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class Rows:
    """Sequences of unequal lengths; the first `skip` targets carry no loss."""

    def __init__(self, lengths=(3, 8, 2, 5, 9, 4, 6), skip=1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.train = [torch.randint(9, (n,), generator=generator).tolist() for n in lengths]
        self.validation = self.train[:3]
        self.skip = skip

    def batch(self, rows):
        return pad_batch(rows, self.skip)


def trainer(config=PLAIN, *, data=None, model=None, seed=0, folder=None, objective=next_token_objective, **sizes):
    """In float64, so that what should be equal differs by rounding of 1e-16 only."""
    if model is None:
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**{**SMALL, **sizes})).double()
    return Trainer(model, data or Rows(), config, objective, folder=folder)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def assert_equal(left: dict, right: dict, tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


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


# --- many steps


def test_training_ends_at_the_threshold_or_at_the_cap():
    ours = trainer(replace(PLAIN, steps=4))
    ours.train()
    assert ours.steps_done == 4
    ours = trainer(replace(PLAIN, steps=400, stop_loss=1.0))
    ours.train()
    losses = [record["loss"] for record in ours.metrics.records() if "loss" in record]
    assert losses[-1] <= 1.0 < min(losses[:-1]) and len(losses) == ours.steps_done < 400


@pytest.mark.parametrize("log_interval", [1, 4])
def test_metrics_have_every_step_and_every_evaluation(tmp_path, log_interval):
    config = replace(PLAIN, log_interval=log_interval, eval_interval=3, clip_norm=1.0, warmup_steps=2)
    ours = trainer(config, folder=tmp_path)
    ours.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "validation_loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in evaluations] == [0, 3, 6]
    assert [r["learning_rate"] for r in steps] == [0.005] + [0.01] * 5
    assert all(r["gradient_norm"] > 0 for r in steps)
    assert evaluations[-1]["validation_loss"] == ours.evaluate(ours.data.validation)
    assert all(r["peak_memory"] > 2**20 and r["seconds"] >= 0 for r in evaluations)
    again = trainer(config, folder=None)
    again.train()
    assert [r["loss"] for r in again.metrics.records() if "loss" in r] == [r["loss"] for r in steps]


RECIPES = {
    "gpt2": gpt2(), "llama": llama(), "untied": gpt2(tied=False), "explicit": gpt2(attention="explicit"),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_the_quick_recipe_learns_the_sentence_within_sixty_steps(config, skip, seed):
    task = SentenceTask(skip=skip)
    torch.manual_seed(seed)
    ours = Trainer(Transformer(config), task, TrainConfig(steps=60, seed=seed))
    ours.train()
    assert ours.evaluate(task.test) <= 1e-5
    ids = task.tokenizer.encode(task.sentence)
    prompt = torch.tensor([[task.tokenizer.begin, *ids[:skip]]] * 10)
    for temperature in (0.0, 0.1):
        tokens = generate(
            ours.model, prompt, 23 - skip, temperature=temperature, generator=torch.Generator().manual_seed(seed)
        )
        assert {task.tokenizer.decode(row) for row in tokens} == {task.sentence}


def test_the_sentence_is_learned_in_bfloat16():
    torch.manual_seed(0)
    ours = Trainer(Transformer(gpt2()), SentenceTask(), TrainConfig(precision="bfloat16", steps=300))
    ours.train()
    assert ours.evaluate(ours.data.test) <= 2e-5  # the last update moves a loss of bfloat16 a little


# --- what goes wrong


def failing_at(step: int, value: float):
    """An objective whose loss is `value` at a step."""
    done = 0

    def objective(model, batch):
        nonlocal done
        total, count = next_token_objective(model, batch)
        if model.training:
            done += 1
        return (total * value if done == step and model.training else total), count

    return objective


@pytest.mark.parametrize("log_interval", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_step_and_the_last_finite_checkpoint_stays(tmp_path, value, log_interval):
    config = replace(PLAIN, steps=20, save_interval=2, log_interval=log_interval)
    ours = trainer(config, folder=tmp_path, objective=failing_at(6, value))
    with pytest.raises(Diverged) as diverged:
        ours.train()
    for said in ("at step 6", str(value), "0.01", f"{tmp_path / 'checkpoint.pt'} holds step 4"):
        assert said in str(diverged.value)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["trainer"]["steps_done"] == 4
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[5]) == {"step": 6, "loss": None, "learning_rate": 0.01}


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    ours = trainer(replace(PLAIN, save_interval=2), folder=tmp_path)
    tick = ours.tick

    def tick_and_break():
        tick()
        if ours.steps_done == 4:
            ours.model.norm.weight.data[0] = math.inf

    ours.tick = tick_and_break
    with pytest.raises(Diverged, match=r"after step 4.*holds step 2"):
        ours.train()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["trainer"]["steps_done"] == 2


def test_without_a_checkpoint_the_error_does_not_promise_one():
    with pytest.raises(Diverged, match="no checkpoint has been saved"):
        trainer(objective=failing_at(1, math.nan)).train()


def interrupting_at(step: int):
    done = 0

    def objective(model, batch):
        nonlocal done
        done += 1
        if done == step:
            signal.raise_signal(signal.SIGINT)
        return next_token_objective(model, batch)

    return objective


def test_ctrl_c_lets_the_step_end_saves_and_raises(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    ours = trainer(replace(PLAIN, steps=50), folder=tmp_path, objective=interrupting_at(3))
    with pytest.raises(KeyboardInterrupt):
        ours.train()
    assert signal.getsignal(signal.SIGINT) is handler
    uninterrupted = trainer(replace(PLAIN, steps=50))
    for _ in range(3):
        uninterrupted.step()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["trainer"]["steps_done"] == 3
    assert_equal(weights(ours), weights(uninterrupted))


def test_an_unwritable_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    ours = trainer(folder=tmp_path / "file" / "out")
    with pytest.raises(OSError, match="Not a directory"):
        ours.train()
    assert ours.steps_done == 0


def test_a_device_that_is_not_there_is_named():
    for device in ("cuda:97", "abacus"):
        with pytest.raises(ValueError, match=device):
            trainer(replace(PLAIN, device=device))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("micro_batch_size", 0), ("log_interval", 0), ("save_interval", -1),
        ("learning_rate", 0.0), ("learning_rate", math.nan), ("clip_norm", 0.0), ("beta1", 1.0), ("beta2", -0.1),
        ("weight_decay", -1.0), ("stop_loss", -1.0), ("optimizer", "sgd"), ("precision", "float16"),
        ("schedule", "linear"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field} must .*{value}"):
        TrainConfig(**{field: value})


def test_the_published_recipe_is_the_homeworks():
    assert (PUBLISHED.optimizer, PUBLISHED.learning_rate, PUBLISHED.batch_size) == ("adam", 3e-3, 32)
    assert (PUBLISHED.steps, PUBLISHED.beta1, PUBLISHED.beta2, PUBLISHED.clip_norm) == (3000, 0.9, 0.999, None)


# --- resuming

SAME = dict(stop_loss=None, batch_size=3, warmup_steps=4, schedule="cosine", steps=8, weight_decay=0.1)


def resumable(optimizer, precision, folder=None):
    """With dropout, so that the random state counts, and windows that do not divide an epoch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL, dropout=0.2))
    return Trainer(model, Rows(), TrainConfig(optimizer=optimizer, precision=precision, **SAME), folder=folder)


COMBINATIONS = [(optimizer, precision) for optimizer in ("adam", "adamw") for precision in ("float32", "bfloat16")]
RESUME = f"""
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_trainer import COMBINATIONS, resumable
for optimizer, precision in COMBINATIONS:
    folder = f"{{sys.argv[1]}}/{{optimizer}}-{{precision}}"
    torch.manual_seed(99)
    torch.rand(5)
    trainer = resumable(optimizer, precision)
    trainer.resume(folder + "/half.pt")
    for _ in range(4):
        trainer.step()
    trainer.save(folder + "/resumed.pt")
"""


def test_training_resumed_in_a_new_process_is_the_same_to_the_bit(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process
    for optimizer, precision in COMBINATIONS:
        folder = tmp_path / f"{optimizer}-{precision}"
        folder.mkdir()
        ours = resumable(optimizer, precision)
        for step in range(8):
            if step == 4:
                ours.save(folder / "half.pt")
            ours.step()
        ours.save(folder / "whole.pt")
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, timeout=300)
    for folder in tmp_path.iterdir():
        whole, resumed, half = (checkpoint.load(folder / f"{name}.pt") for name in ("whole", "resumed", "half"))
        assert identical(whole, resumed), folder.name
        assert not identical(whole, half)


def identical(left, right) -> bool:
    """Nested containers of tensors and plain values, equal to the bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_a_resumed_training_writes_the_metrics_of_one_that_never_stopped(tmp_path):
    config = replace(PLAIN, steps=8, eval_interval=2, save_interval=4)
    trainer(config, folder=tmp_path / "whole").train()
    first = trainer(config, folder=tmp_path / "parts", objective=failing_at(7, math.nan))
    with pytest.raises(Diverged):
        first.train()  # after writing metrics past the checkpoint of step 4
    second = trainer(config, folder=tmp_path / "parts")
    second.resume(tmp_path / "parts" / "checkpoint.pt")
    second.train()

    def records(name):
        found = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in found]

    assert records("parts") == records("whole")


def test_a_finished_training_resumed_does_nothing_more(tmp_path):
    ours = trainer(folder=tmp_path)
    ours.train()
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = trainer(folder=tmp_path)
    again.resume(tmp_path / "checkpoint.pt")
    again.train()
    assert again.steps_done == 6 and (tmp_path / "metrics.jsonl").read_text() == lines
    assert_equal(weights(ours), weights(again))


def test_a_checkpoint_that_is_not_of_this_training_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    with pytest.raises(checkpoint.CheckpointError, match=r"norm.weight has shape \[8\].*\[4\]"):
        trainer(n_embd=4).resume(path)
    with pytest.raises(ValueError, match=r"7 examples.* 2"):
        trainer(data=Rows((3, 4))).resume(path)
    checkpoint.save(path, model={})
    with pytest.raises(checkpoint.CheckpointError, match="no state of a trainer"):
        trainer().resume(path)
