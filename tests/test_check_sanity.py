"""The two sanity checks: which models pass, which fail, and what the messages tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_checks.checks import check_sanity
from transformer_checks.checks.check_sanity import check_learns_only_unmasked_targets, check_memorizes_the_sentence
from transformer_checks.checks.reference import reference, reference_parts
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.checks.training import sentence
from transformer_checks.transformer.data import SentenceTask

BOTH = [check_memorizes_the_sentence, check_learns_only_unmasked_targets]
LLAMA = dict(positions="rotary", norm="rms", feed_forward="swiglu", bias=False, tied=False)


def with_parts(config=None, **parts) -> Subject:
    """The reference with some parts replaced."""
    mine = reference_parts(**(config or {}))
    vars(mine).update(parts)
    return Subject("damaged", mine, seed=4)


@pytest.fixture
def impatient(monkeypatch):
    """Recipes that end early: no test has to wait for a model that does not learn."""
    from dataclasses import replace

    short = {name: replace(recipe, steps=60) for name, recipe in sentence.RECIPES.items()}
    monkeypatch.setattr(sentence, "RECIPES", short)


@pytest.mark.parametrize("check", BOTH, ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(3))
def test_both_families_pass_by_the_quick_recipe(check, family, seed):
    verdict = judge(check, Subject("reference", reference_parts(**family), seed=seed), {})
    assert verdict.outcome == "passed", verdict.says
    assert verdict.evidence["recipe"] == "quick"
    assert verdict.evidence["loss"] <= 1e-5
    assert verdict.evidence["steps"] < 100


def test_every_prefix_is_completed_greedily_and_ten_samples_are_drawn():
    verdict = judge(check_memorizes_the_sentence, reference(seed=1), {})
    samples = verdict.kept["learned"].samples
    greedy = [(prompt, completion) for how, prompt, completion in samples if how == "greedy"]
    assert [prompt + completion for prompt, completion in greedy] == ["I love machine learning"] * 23
    assert sorted(len(prompt) for prompt, _ in greedy) == list(range(23))
    assert [completion for how, _, completion in samples if "0.1" in how] == ["I love machine learning"] * 10


def test_completions_of_masked_targets_are_shown_and_not_judged():
    verdict = judge(check_learns_only_unmasked_targets, reference(seed=1), {})
    assert verdict.outcome == "passed"
    shown = {prompt: how for how, prompt, _ in verdict.kept["learned"].samples}
    assert shown["I l"] == "greedy"
    assert "not judged" in shown[""]
    assert "not judged" in shown["I"]


def test_a_loss_that_ignores_the_mask_does_not_pass():
    subject = with_parts(loss=lambda logits, targets, mask=None: F.cross_entropy(logits.transpose(1, 2), targets))
    assert judge(check_memorizes_the_sentence, subject, {}).outcome == "passed"
    verdict = judge(check_learns_only_unmasked_targets, subject, {})
    assert verdict.outcome in ("failed", "not_applicable")


def masked_mean(logits, targets, mask):
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum() / mask.sum()


def test_a_mask_shifted_by_one_is_named():
    def shifted(logits, targets, mask=None):
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        return masked_mean(logits, targets, torch.cat((mask[:, 1:], mask[:, -1:]), dim=1))

    verdict = judge(check_learns_only_unmasked_targets, with_parts(loss=shifted), {})
    assert verdict.outcome == "failed"
    assert "loss-mask-shifted-by-one" in verdict.likely


def test_a_model_that_cannot_learn_fails(impatient):
    class Deaf(nn.Module):
        """Logits that do not depend on the tokens."""

        def __init__(self, vocab_size):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(vocab_size))

        def forward(self, tokens):
            return self.bias.expand(*tokens.shape, -1)

    parts = SimpleNamespace(build_model=lambda vocab_size, **_: Deaf(vocab_size))
    verdict = judge(check_memorizes_the_sentence, Subject("deaf", parts), {})
    assert verdict.outcome == "failed"
    assert "does not learn the sentence" in verdict.says
    assert verdict.evidence["loss_after"] > 0.3
    assert len(verdict.evidence["tried"]) == 2


def test_learning_too_slowly_has_a_message_of_its_own(impatient, monkeypatch):
    for module in (check_sanity, sentence):
        monkeypatch.setattr(module, "LEARNED", 1e-12)
    verdict = judge(check_memorizes_the_sentence, reference(), {})
    assert verdict.outcome == "failed"
    assert "but too slowly" in verdict.says
    assert "quick recipe" in verdict.says
    assert "published recipe" in verdict.says


def test_a_loss_that_is_not_finite_names_its_step(impatient):
    calls = []

    def breaks(logits, targets, mask=None):
        calls.append(1)
        return F.cross_entropy(logits.transpose(1, 2), targets) * (float("nan") if len(calls) > 40 else 1.0)

    parts = reference_parts()
    parts.loss = breaks
    verdict = judge(check_memorizes_the_sentence, Subject("breaks", parts), {})
    assert verdict.outcome == "failed"
    assert f"step {verdict.evidence['step']}" in verdict.says
    assert "nan" in verdict.says


def test_a_model_too_short_for_the_sentence_is_not_applicable():
    class Fixed(Subject):
        def can_vary(self, name):
            return name != "block_size"

    verdict = judge(check_memorizes_the_sentence, Fixed("short", reference_parts()), {})
    assert verdict.outcome == "not_applicable"
    assert verdict.evidence == {"block_size": 13}
    assert "23" in verdict.says


def test_wrong_text_at_a_low_loss_is_shown_beside_the_right_one():
    def first_position(model, prompt, max_new_tokens, temperature=1.0):
        for _ in range(max_new_tokens):
            prompt = torch.cat((prompt, model(prompt)[:, :1].argmax(-1)), dim=1)
        return prompt

    verdict = judge(check_memorizes_the_sentence, with_parts(generate=first_position), {})
    assert verdict.outcome == "failed"
    assert verdict.evidence["expected"] == "I love machine learning"
    assert verdict.evidence["said"] == "I" * 23
    assert "number 2" in verdict.says


def raises(model, prompt, max_new_tokens, temperature=1.0):
    raise AttributeError("no tokenizer here")


def adds_nothing(model, prompt, max_new_tokens, temperature=1.0):
    return prompt


def reads_its_last_token(model, prompt, max_new_tokens, temperature=1.0):
    for _ in range(max_new_tokens):
        prompt = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], dim=1)
        model(prompt)
    return prompt


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize("generate", [raises, adds_nothing, reads_its_last_token])
def test_a_generate_that_breaks_is_replaced_by_a_loop_over_the_logits(generate, temperature):
    """The generation checks judge a broken generate; here the sentence is decoded from the logits."""
    parts = reference_parts()
    parts.generate = generate
    subject, task = Subject("breaks", parts, seed=3), SentenceTask()
    model = subject.build(vocab_size=task.tokenizer.vocab_size, block_size=task.block_size)
    learned = SimpleNamespace(trainer=SimpleNamespace(model=model), task=task)
    longest = len(task.sentence)
    decode = check_sanity.generate_of(subject, learned)
    rows = decode(torch.full((1, 1), task.tokenizer.begin), longest, temperature)
    assert len(rows) == 1 and len(rows[0]) == longest
