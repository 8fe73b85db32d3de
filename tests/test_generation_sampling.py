"""Sampling: the exact supports of the filters, and the stated distribution of the draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer_checks.transformer import generation
from transformer_checks.transformer.generation import generate, next_token, top_k_filter, top_p_filter

thorough = settings(max_examples=40, deadline=None, derandomize=True, database=None)

LEVEL = 1e-3  # of every χ² test: a right sampler with an unlucky seed fails one in a thousand; the seeds are fixed
DRAWS = 100_000


def bigram(table: torch.Tensor):
    """A model whose next token depends on the latest alone; it has no config, no mode and no cache."""
    return lambda tokens: table[tokens]


# --- the filters, and the order they come in


LOGITS = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.04, 0.06, 0.1, 0.1, 0.2, 0.5]]).log()


def support(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize(
    ("k", "kept"),
    [(1, [[0], [5]]), (2, [[0, 1], [4, 5]]), (5, [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]), (6, [[*range(6)]] * 2),
     (99, [[*range(6)]] * 2), (3, [[0, 1, 2, 3], [2, 3, 4, 5]])],
)  # fmt: skip
def test_top_k_keeps_each_rows_k_likeliest_and_what_ties_with_the_last(k, kept):
    filtered = top_k_filter(LOGITS, k)
    assert support(filtered) == kept
    assert torch.equal(filtered[filtered.isfinite()], LOGITS[filtered.isfinite()])


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1e-9, [[0], [5]]), (0.49, [[0], [5]]), (0.51, [[0, 1], [4, 5]]), (0.69, [[0, 1], [4, 5]]),
     (0.71, [[0, 1, 2], [2, 4, 5]]), (0.95, [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]), (0.97, [[*range(6)]] * 2),
     (1.0, [[*range(6)]] * 2)],
)  # fmt: skip
def test_top_p_keeps_each_rows_smallest_set_that_reaches_p(p, kept):
    filtered = top_p_filter(LOGITS, p)
    assert support(filtered) == kept
    assert torch.equal(filtered[filtered.isfinite()], LOGITS[filtered.isfinite()])


@thorough
@given(seed=st.integers(0, 2**31), V=st.integers(1, 40), p=st.floats(1e-6, 1.0))
def test_top_p_is_the_smallest_such_set_for_any_logits(seed, V, p):
    logits = 3 * torch.randn(1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = support(top_p_filter(logits, p))[0]
    probabilities = logits[0].softmax(0)
    others = [i for i in range(V) if i not in kept]
    assert probabilities[kept].sum() >= p - 1e-12
    assert len(kept) == 1 or probabilities[kept].sum() - probabilities[kept].min() < p + 1e-12
    assert not others or probabilities[kept].min() >= probabilities[others].max()


def test_top_p_of_one_keeps_even_what_a_rounded_sum_would_lose():
    logits = torch.tensor([[0.0, -40.0]])
    assert support(top_p_filter(logits, 1.0)) == [[0, 1]]


def test_top_p_is_taken_among_the_top_k():
    """Of the two likeliest the first has 5/7, more than 0.7; of all six it has 0.5."""
    draws = sampled(LOGITS[:1], temperature=1.0, top_k=2, top_p=0.7)
    assert draws.unique().tolist() == [0]
    assert sampled(LOGITS[:1], temperature=1.0, top_p=0.7 + 1e-6).unique().tolist() == [0, 1, 2]


def test_filters_come_after_the_temperature():
    """At temperature 0.1 the likeliest has more than 0.99 and is alone; at 1 it has half and is not."""
    assert sampled(LOGITS[:1], temperature=0.1, top_p=0.99).unique().tolist() == [0]
    assert len(sampled(LOGITS[:1], temperature=1.0, top_p=0.99).unique()) > 1


def sampled(logits: torch.Tensor, seed: int = 0, n: int = DRAWS, **how) -> torch.Tensor:
    """n draws after one row of logits [1, V], through `generate` itself."""
    model = bigram(logits.expand(logits.shape[1], -1))
    prompt = torch.zeros(n, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    return generate(model, prompt, 1, generator=generator, use_cache=False, **how)[:, 1]


# --- sampling


def p_value(draws: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Of Pearson's χ²: how often right draws would be at least this far from `probabilities`."""
    counts, possible = draws.bincount(minlength=len(probabilities)).double(), probabilities > 0
    if counts[~possible].any():
        return 0.0
    expected = len(draws) * probabilities[possible].double()
    assert expected.min() >= 5  # below, χ² does not hold
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("how", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_draws_have_the_stated_distribution(temperature, how):
    """p = softmax(z / T), cut to the filters' support and renormalized; written here without the filters."""
    z = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.1, -0.3, -1.0]], dtype=torch.float64)
    probabilities = (z[0] / temperature).softmax(0)  # in descending order
    if "top_k" in how:
        probabilities[how["top_k"] :] = 0
        probabilities /= probabilities.sum()
    if "top_p" in how:
        kept = int((probabilities.cumsum(0) < how["top_p"]).sum()) + 1
        probabilities[kept:] = 0
        probabilities /= probabilities.sum()
    draws = sampled(z, temperature=temperature, **how)
    assert p_value(draws, probabilities) > LEVEL
    wrong = (z[0] / (1.1 * temperature)).softmax(0) * (probabilities > 0)
    assert p_value(draws, wrong / wrong.sum()) < LEVEL  # a temperature wrong by a tenth is seen


def test_rows_and_steps_are_drawn_independently():
    """From a uniform model, pairs of successive tokens and of neighbouring rows are uniform over all 25 pairs."""
    prompt = torch.zeros(DRAWS, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    got = generate(bigram(torch.zeros(5, 5)), prompt, 2, temperature=1.0, generator=generator, use_cache=False)
    for pairs in (5 * got[:, 1] + got[:, 2], 5 * got[0::2, 1] + got[1::2, 1]):
        assert p_value(pairs, torch.full((25,), 1 / 25)) > LEVEL


def test_a_temperature_near_zero_is_greedy_and_never_nan():
    logits = torch.tensor([[1.0, 1.001, -5.0], [900.0, -900.0, 899.0]])
    for temperature in (1e-6, 1e-30, 1e-300):
        assert next_token(logits, temperature, None, None, torch.Generator()).tolist() == [1, 0]


def test_without_a_generator_every_call_draws_anew():
    model, prompt = bigram(torch.zeros(10, 10)), torch.zeros(1, 1, dtype=torch.long)
    torch.manual_seed(0)
    first = generate(model, prompt, 40, temperature=1.0, use_cache=False)
    torch.manual_seed(0)
    assert not torch.equal(first, generate(model, prompt, 40, temperature=1.0, use_cache=False))


def test_half_precision_logits_are_filtered_and_sampled_in_float32(monkeypatch):
    """Of 5000 equal tokens, 2503 are needed to pass 0.5005; sums in bfloat16 tell no two of ten neighbours apart."""
    monkeypatch.setattr(generation, "sample", lambda logits, generator: logits)
    drawn_from = next_token(torch.zeros(1, 5000, dtype=torch.bfloat16), 1.0, None, 0.5005, None)
    assert drawn_from.dtype == torch.float32 and support(drawn_from) == [[*range(2503)]]
