"""Penalties and beam search: what is reported for each bug, and right loops of other forms that must pass."""

from __future__ import annotations

import pytest
import torch

from tests.decoding_verdicts import SEED, findings, verdict, verdicts, with_generate
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.search import penalizing, searching
from transformer_checks.checks.subject import Subject

PENALTY = "check_a_penalty_makes_no_used_token_likelier"
BEAMS = "check_beam_search_finds_the_likeliest"
LENGTH = "check_beam_length_is_that_of_the_new_tokens"


@pytest.mark.parametrize(
    ("bug", "check", "facts"),
    [
        ("penalty-divides-negative-logits", PENALTY, ["repetition_penalty=4", "logit -40", "logits are negative"]),
        ("penalty-ignored", PENALTY, ["the penalty has no effect"]),
        ("beams-keep-old-caches", BEAMS, ["of log-probability", "must follow the beams"]),
        ("beams-all-alike", BEAMS, ["what greedy decoding gives"]),
        ("beam-length-counts-prompt", LENGTH, ["a prompt of 2 tokens", "repeated to 8", "counts the prompt"]),
    ],
)
def test_a_message_has_the_facts_and_the_bug_is_the_likeliest(bug, check, facts):
    found = verdict(bug, check)
    for fact in facts:
        assert fact in found.says, found.says
    assert found.likely[0] == bug


@pytest.mark.parametrize("bug", [bug for bug in all_bugs().values() if bug.component == "search"], ids=lambda b: b.id)
def test_one_bug_gives_one_finding(bug):
    assert len(findings(bug.subject(seed=SEED))) == 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("parts", [penalizing, searching], ids=["penalty", "beams"])
def test_right_loops_pass(parts, seed):
    found = verdicts(Subject("right", parts(), seed=seed))
    assert {name: v.says for name, v in found.items() if v.outcome in ("failed", "error", "blocked")} == {}
    assert any(found[name].outcome == "passed" for name in (PENALTY, BEAMS))


def choose(logits, do_sample):
    odds = logits.softmax(-1)
    return torch.multinomial(odds, 1) if do_sample else odds.argmax(-1, keepdim=True)


@torch.no_grad()
def subtracts(model, idx, max_new_tokens, do_sample=False, presence_penalty=0.0):
    """A constant is subtracted from what occurs in the text."""
    for _ in range(max_new_tokens):
        logits = model(idx[:, -model.config.block_size :])[:, -1]
        logits = logits - presence_penalty * torch.zeros_like(logits).scatter(1, idx, 1.0)
        idx = torch.cat((idx, choose(logits, do_sample)), dim=1)
    return idx


@torch.no_grad()
def adds(model, idx, max_new_tokens, do_sample=False, presence_penalty=0.0):
    return subtracts(model, idx, max_new_tokens, do_sample, -presence_penalty)


@torch.no_grad()
def divides_probabilities(model, idx, max_new_tokens, do_sample=False, repetition_penalty=1.0):
    """Probabilities have one sign."""
    for _ in range(max_new_tokens):
        odds = model(idx[:, -model.config.block_size :])[:, -1].softmax(-1)
        odds = odds.scatter(1, idx, odds.gather(1, idx) / repetition_penalty)
        idx = torch.cat((idx, choose(odds.log(), do_sample)), dim=1)
    return idx


@torch.no_grad()
def penalizes_new_tokens_only(model, idx, max_new_tokens, do_sample=False, repetition_penalty=1.0):
    T = idx.shape[1]
    for _ in range(max_new_tokens):
        logits, new = model(idx[:, -model.config.block_size :])[:, -1], idx[:, T:]
        used = logits.gather(1, new)
        used = torch.where(used > 0, used / repetition_penalty, used * repetition_penalty)
        idx = torch.cat((idx, choose(logits.scatter(1, new, used), do_sample)), dim=1)
    return idx


@pytest.mark.parametrize("function", [subtracts, divides_probabilities, penalizes_new_tokens_only])
def test_penalties_of_other_forms_pass(function):
    found = verdicts(with_generate(function, seed=SEED))
    assert found[PENALTY].outcome == "passed", found[PENALTY].says


def test_a_penalty_that_is_added_is_found():
    found = verdicts(with_generate(adds, seed=SEED))[PENALTY]
    assert found.outcome == "failed" and "presence_penalty=60" in found.says


def test_a_penalty_with_a_range_of_its_own_is_not_judged():
    def refusing(model, idx, max_new_tokens, repetition_penalty=1.0):
        if repetition_penalty > 2:
            raise ValueError("the repetition penalty must be at most 2")
        return subtracts(model, idx, max_new_tokens, True)

    found = verdicts(with_generate(refusing, seed=SEED))[PENALTY]
    assert found.outcome == "not_applicable" and "at most 2" in found.says


def test_a_beam_search_that_stops_at_a_likely_end_is_no_row_that_stops_for_another():
    found = verdicts(Subject("beams", searching(), seed=SEED))
    assert found["check_end_token_ends_its_row"].outcome == "passed"
    assert found[LENGTH].evidence["new_tokens"][0] == found[LENGTH].evidence["new_tokens"][1]
