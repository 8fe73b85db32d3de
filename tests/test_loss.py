"""The loss: its value from the formula, its gradient exactly where it belongs, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_checks.transformer.data import pad_batch
from transformer_checks.transformer.loss import loss_mask, loss_sum, next_token_loss

thorough = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random_case(B: int, T: int, V: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, T), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    return logits.to(dtype), targets, mask


def losses_by_formula(logits, targets) -> np.ndarray:
    """-log softmax(logits)[target] in NumPy, [B, T]."""
    x = logits.double().numpy()
    log_total = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    return log_total - np.take_along_axis(x, targets.numpy()[..., None], -1)[..., 0]


cases = given(st.integers(1, 4), st.integers(1, 7), st.integers(2, 9), st.integers(0, 999))


@thorough
@cases
def test_it_is_the_mean_of_the_formula_over_the_targets_kept(B, T, V, seed):
    logits, targets, mask = random_case(B, T, V, seed)
    expected = losses_by_formula(logits, targets)
    assert next_token_loss(logits, targets).item() == pytest.approx(expected.mean(), rel=1e-12)
    if mask.any():
        kept = expected[mask.numpy()]
        assert next_token_loss(logits, targets, mask).item() == pytest.approx(kept.mean(), rel=1e-12)
        total, count = loss_sum(logits, targets, mask)
        assert (total.item(), count.item()) == (pytest.approx(kept.sum(), rel=1e-12), mask.sum().item())


@thorough
@cases
def test_gradient_is_softmax_minus_target_over_the_count_and_exactly_zero_elsewhere(B, T, V, seed):
    logits, targets, mask = random_case(B, T, V, seed)
    logits.requires_grad_()
    next_token_loss(logits, targets, mask).backward()
    gradient = logits.softmax(-1) - torch.nn.functional.one_hot(targets, V)
    expected = gradient * mask[..., None] / max(1, int(mask.sum()))
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=0, atol=1e-14)
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_masked_may_be_anything(poison):
    logits, targets, mask = random_case(3, 5, 7, seed=1)
    expected = next_token_loss(logits, targets, mask)
    logits[~mask], targets[~mask] = poison, -100
    logits.requires_grad_()
    loss = next_token_loss(logits, targets, mask)
    loss.backward()
    assert loss.item() == expected.item()
    assert (logits.grad[~mask] == 0).all() and logits.grad.isfinite().all()


def test_a_batch_without_a_target_gives_zero_and_no_gradient():
    logits, targets, mask = random_case(2, 3, 5, seed=2)
    logits.requires_grad_()
    loss = next_token_loss(logits, targets, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_sums_and_counts_of_parts_add_up_to_the_whole_as_means_do_not():
    logits, targets, mask = random_case(4, 5, 7, seed=3)
    mask[0] = True
    parts = [loss_sum(logits[i : i + 1], targets[i : i + 1], mask[i : i + 1]) for i in range(4)]
    whole = next_token_loss(logits, targets, mask)
    assert sum(t for t, _ in parts) / sum(n for _, n in parts) == pytest.approx(whole.item(), rel=1e-12)
    means = torch.stack([t / n.clamp(min=1) for t, n in parts]).mean()
    assert abs(means - whole) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_before_anything_is_computed(dtype):
    logits, targets, mask = random_case(3, 5, 7, seed=4, dtype=dtype)
    loss = next_token_loss(logits, targets, mask)
    assert loss.dtype == torch.float32
    assert loss == next_token_loss(logits.float(), targets, mask)


def test_float64_stays_float64():
    logits, targets, mask = random_case(2, 3, 5, seed=5)
    assert next_token_loss(logits, targets, mask).dtype == torch.float64


def test_confident_logits_stay_finite():
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    loss = next_token_loss(logits, torch.tensor([[2]]))
    loss.backward()
    assert loss.item() == 2e4
    assert logits.grad.tolist() == [[[1.0, 0.0, -1.0]]]


def test_memory_layout_does_not_matter_and_nothing_is_written_to():
    logits, targets, mask = random_case(3, 6, 5, seed=6)
    whole = torch.cat((targets[:, :1], targets), dim=1)
    before = [x.clone() for x in (logits, whole, mask)]
    turned = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert next_token_loss(turned, whole[:, 1:], mask) == next_token_loss(logits, targets, mask)
    assert all(torch.equal(x, y) for x, y in zip((logits, whole, mask), before, strict=True))


# the mask


def test_the_first_targets_of_a_row_and_its_padding_carry_no_loss():
    real = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    assert loss_mask(real).equal(real)
    assert loss_mask(real, skip=2).tolist() == [
        [False, False, True, True, False],  # padded on the right
        [False, False, False, False, True],  # padded on the left: its own first two
        [False] * 5,  # shorter than what is skipped
    ]


def test_skipping_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="-1"):
        loss_mask(torch.ones(1, 2).bool(), skip=-1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pad", [0, 3])  # 3 is also the end token
def test_padding_never_counts_and_an_end_token_does(pad, side):
    batch = pad_batch([[0, 1, 3], [0, 2, 1, 2, 3]], pad=pad, side=side)
    assert batch.targets[batch.loss_mask].tolist() == [1, 3, 2, 1, 2, 3]
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    next_token_loss(logits, batch.targets, batch.loss_mask).backward()
    assert torch.equal(logits.grad.ne(0).any(-1), batch.loss_mask)


# what is refused


@pytest.mark.parametrize(
    ("logits", "targets", "mask", "said"),
    [
        ((2, 3, 5), (2, 4), None, r"\[2, 3, 5\].*\[2, 4\]"),
        ((6, 5), (6,), None, r"\[6, 5\].*\[6\]"),
        ((2, 3, 5), (2, 3), (2, 1), r"\[2, 3\].*\[2, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, targets, mask, said):
    with pytest.raises(ValueError, match=said):
        next_token_loss(torch.zeros(logits), torch.zeros(targets).long(), mask and torch.ones(mask).bool())


@pytest.mark.parametrize("target", [-100, -1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_target_outside_the_vocabulary_is_named_unless_it_is_masked(target, masked):
    mask = torch.tensor([[True, not masked]])
    logits, targets = torch.zeros(1, 2, 5), torch.tensor([[1, target]])
    if masked:
        assert next_token_loss(logits, targets, mask).item() == pytest.approx(np.log(5))
        return
    with pytest.raises(ValueError, match=rf"{target} is outside the vocabulary: 0 to 4"):
        next_token_loss(logits, targets, mask)
