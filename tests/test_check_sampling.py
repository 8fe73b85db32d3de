"""The checks of sampling: what they report for each bug and for wrong loops, and the χ² test that they use."""

from __future__ import annotations

import pytest
import torch

from tests.decoding_verdicts import (
    CHECKS,
    SEED,
    changed,
    findings,
    greedy_only,
    nanogpt,
    verdict,
    verdicts,
    with_generate,
)
from transformer_checks.checks.generation.draws import scores, unlikely
from transformer_checks.checks.generation.scripted import dealt
from transformer_checks.checks.run.verdict import judge


@pytest.mark.parametrize(
    ("bug", "check", "facts"),
    [
        ("temperature-multiplied", "check_temperature_divides_the_logits", ["multiplied by 0.5, not by 2"]),
        ("temperature-ignored", "check_temperature_divides_the_logits", ["multiplied by 1, not by 2"]),
        ("temperature-zero-division", "check_temperature_zero_is_greedy", ["likeliest token is always"]),
        ("topk-off-by-one-more", "check_top_k_keeps_k", ["top_k=3 keeps 4 tokens, should keep 3"]),
        ("topk-strict-inequality", "check_top_k_keeps_k", ["top_k=3 keeps 2 tokens, should keep 3"]),
        ("topp-drops-crossing-token", "check_top_p_keeps_the_nucleus", ["keeps 7 tokens, should keep 8"]),
        ("topp-mask-not-unsorted", "check_top_p_keeps_the_nucleus", ["keeps 8 tokens, but not the likeliest"]),
        ("topp-threshold-inverted", "check_top_p_keeps_the_nucleus", ["keeps 4 tokens, should keep 8"]),
        ("multinomial-of-other-weights", "check_temperature_divides_the_logits", ["the sigmoid of the logits"]),
        ("sampling-is-greedy", "check_temperature_divides_the_logits", ["the same token in", "it is greedy"]),
        ("topk-skips-topp", "check_filters_work_together", ["top_p is ignored when both are given"]),
        ("topk-answers-a-place", "check_filters_work_together", ["drew token 10", "returns token 0"]),
        ("seed-fixed-inside-generate", "check_samples_differ_unless_seeded", ["without a seed are the same"]),
        ("generator-ignored", "check_samples_differ_unless_seeded", ["the same generator gives"]),
    ],
)  # fmt: skip
def test_a_message_has_the_facts_and_the_bug_is_the_likeliest(bug, check, facts):
    found = verdict(bug, check)
    for fact in facts:
        assert fact in found.says, found.says
    assert found.likely[0] == bug


def test_the_threshold_of_another_row_keeps_different_numbers_by_row():
    found = verdict("topk-threshold-of-another-row", "check_top_k_keeps_k")
    assert len(set(found.evidence["kept_by_row"])) > 1 and found.likely == ("topk-threshold-of-another-row",)


@pytest.mark.parametrize(
    ("function", "check", "facts"),
    [
        (changed('-float("inf")', "0.0"), "check_top_k_keeps_k",
         ["keeps all 17 tokens", "to -∞, not to 0"]),
        (changed("if top_k is not None", "if top_k is not None and idx.shape[1] > 2"), "check_top_k_keeps_k",
         ["keeps all 17 tokens, should keep 3", "not applied to the first new token"]),
        (changed("values[:, [-1]]]", "values[:1, [-1]]]"), "check_top_k_keeps_k", ["should keep 3", "row"]),
        (changed("F.softmax(logits, dim=-1)", "F.softmax(logits, dim=0)"), "check_temperature_divides_the_logits",
         ["a softmax over rows"]),
        (changed("F.softmax(logits, dim=-1)", "F.softmax(logits, dim=-1).clamp(min=1e-3)"),
         "check_temperature_divides_the_logits", ["rank 17", "after the softmax"]),
    ],
)  # fmt: skip
def test_a_bug_in_a_foreign_loop_is_named(function, check, facts):
    found = judge(CHECKS[check], with_generate(function, seed=SEED), {})
    assert found.outcome == "failed", f"{found.outcome}: {found.says}"
    for fact in facts:
        assert fact in found.says, found.says


def test_a_greedy_generate_is_not_judged_as_a_sampler():
    found = verdicts(with_generate(greedy_only))
    assert found["check_greedy_equals_the_naive_loop"].outcome == "passed"
    assert found["check_temperature_divides_the_logits"].outcome == "not_applicable"
    assert found["check_samples_differ_unless_seeded"].outcome == "not_applicable"


def test_a_refused_temperature_of_zero_is_advice():
    found = verdicts(with_generate(nanogpt))
    assert "temperature 0 raises" in found["check_temperature_zero_is_greedy"].remarks[0]


def gumbel(model, prompt, max_new_tokens, temperature=1.0, top_k=None, wrong=False):
    """A sampler that does not call torch.multinomial: argmax of logits plus Gumbel noise."""
    for _ in range(max_new_tokens):
        logits = model(prompt[:, -model.config.block_size :])[:, -1] * (temperature if wrong else 1 / temperature)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(min(top_k + wrong, 17)).values[:, -1:], -torch.inf)
        noise = -(-torch.rand_like(logits).clamp(min=1e-12).log()).log()
        prompt = torch.cat((prompt, (logits + noise).argmax(-1, keepdim=True)), dim=1)
    return prompt


@pytest.mark.parametrize("seed", range(4))
def test_a_sampler_without_multinomial_is_judged_by_its_counts(seed):
    assert findings(with_generate(torch.no_grad()(gumbel), seed=seed)) == {}

    def wrong(model, prompt, max_new_tokens, temperature=1.0, top_k=None):
        return torch.no_grad()(gumbel)(model, prompt, max_new_tokens, temperature, top_k, wrong=True)

    subject = with_generate(wrong, seed=seed)
    for check in ("check_temperature_divides_the_logits", "check_top_k_keeps_k"):
        found = judge(CHECKS[check], subject, {})
        assert found.outcome == "failed" and "χ²" in found.says, found.says


# -- the parts


def test_every_row_gets_its_own_probabilities():
    given = scores(17, 3, seed=0)
    assert torch.allclose(given.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    logits = dealt(given)(torch.zeros(3, 5, 17, dtype=torch.float64), None)
    assert torch.equal(logits[:, 4], given) and len({float(row.max()) for row in given}) == 3


def test_chi_square_accepts_correct_draws_and_rejects_impossible_ones():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    rare = sum(
        unlikely(torch.multinomial(p, 768, True, generator=torch.Generator().manual_seed(i)).bincount(minlength=4), p)
        < 0.05
        for i in range(400)
    )
    assert 5 <= rare <= 40  # 20 expected
    assert unlikely(torch.tensor([500, 300, 199, 1]), p) == 0.0
    assert unlikely(torch.tensor([500, 200, 300, 0]), p) < 1e-6
