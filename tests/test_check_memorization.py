"""The memorization checks: how much context their strings need, and what the messages tell."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.check_memorization import (
    Task,
    check_memorizes_a_random_string,
    check_memorizes_two_strings_with_the_same_middle,
    context_needed,
    floor,
    run,
)
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.data import SentenceTask

BOTH = (check_memorizes_a_random_string, check_memorizes_two_strings_with_the_same_middle)


def test_the_context_needed_is_counted_in_latest_tokens():
    assert context_needed([[1, 2, 3]]) == 1
    assert context_needed([[1, 2, 1, 3]]) == 2
    assert context_needed([[1, 7, 8, 2], [3, 7, 8, 4]]) == 3
    assert context_needed([[1, 2], [1, 3]]) is None
    task = SentenceTask()
    assert context_needed([task.tokenizer.encode(task.sentence)]) == 3


def test_the_floor_of_a_short_context_is_its_entropy():
    strings = [[1, 7, 8, 2], [3, 7, 8, 4]]
    assert floor(strings, 2) == pytest.approx(2 * math.log(2) / 6)
    assert floor(strings, 3) == 0


@pytest.mark.parametrize("check", BOTH)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("config", [{}, dict(positions="rotary", norm="rms", tied=False)], ids=str)
def test_the_reference_learns_both(check, seed, config):
    found = judge(check, Subject("transformer", reference_parts(**config), seed=seed), {})
    assert found.outcome == "passed", found.says


def test_the_strings_need_more_context_than_a_bigram_or_trigram_has():
    found = judge(BOTH[1], Subject("transformer", reference_parts()), {})
    assert found.evidence["context_needed"] >= 4 and found.evidence["sentence_context_needed"] == 3


def test_a_model_that_ignores_the_past_is_recognized_by_its_loss():
    found = judge(BOTH[1], all_bugs()["attention-forgets-the-past"].subject(), {})
    assert found.outcome == "failed" and "the 4 tokens that both strings share" in found.says
    assert found.evidence["loss"] == pytest.approx(2 * math.log(2) / 22, rel=0.01)


def test_an_infinite_loss_fails_with_its_step():
    found = judge(BOTH[0], all_bugs()["vocabulary-masked-too-far"].subject(), {})
    assert found.outcome == "failed" and "inf at step 1" in found.says


def test_a_tokenizer_that_makes_the_sentence_a_bigram_task_gets_advice():
    class Words:
        def encode(self, text):
            return [1 + text.split().index(word) for word in text.split()]

    parts = reference_parts()
    parts.tokenizer = Words()
    found = judge(BOTH[1], Subject("transformer", parts), {})
    assert found.outcome == "passed" and "a bigram model can memorize it" in " ".join(found.remarks)


def test_a_vocabulary_that_is_too_small_is_not_applicable():
    class Fixed(Subject):
        def can_vary(self, name):
            return False

    subject = Fixed("fixed", reference_parts())
    subject.sizes = type(subject.sizes)(vocab_size=9)
    found = judge(BOTH[0], subject, {})
    assert found.outcome == "not_applicable" and "vocabulary of 9" in found.says


def test_a_batch_that_holds_only_one_string_does_not_end_training():
    """Its loss may be low while the other string is not learned."""

    class Half:
        config, steps_done = SimpleNamespace(steps=50), 0

        def step(self):
            self.steps_done += 1
            return 1e-6

        def evaluate(self, strings):
            return 5.0 if self.steps_done < 30 else 1e-6

    trainer = Half()
    assert run(trainer, Task([[1, 2], [3, 4]])) == 1e-6 and trainer.steps_done == 30
