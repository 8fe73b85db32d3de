"""Time limits: processor time counts, a slow model is not applicable, and only what never ends is an error."""

import contextlib
import time

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from transformer_checks.checks.expect import drawn, fail, note
from transformer_checks.checks.meet import process
from transformer_checks.checks.meet.process import Stopwatch, TimeIsUp, alarm
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge


def work(seconds):
    watch = Stopwatch()
    while watch.seconds < seconds:
        pass


class Model(nn.Module):
    """Works for a while in each call, and forever on a row that starts with the last id."""

    seconds = 0.0

    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)
        self.last = vocab_size - 1

    def forward(self, tokens):
        work(self.seconds)
        while bool((tokens[:, 0] == self.last).all()):
            pass
        return self.head(self.embedding(tokens).cumsum(dim=1))


def verdict(check, seconds, monkeypatch, *, of_check=100.0, of_call=100.0):
    subject = subject_of(Model)
    monkeypatch.setattr(Model, "seconds", seconds)
    monkeypatch.setattr(process, "CHECK_SECONDS", of_check)
    monkeypatch.setattr(subject.loaded.sandbox, "seconds", of_call)
    return judge(check, subject, {})


def read(subject, first=0):
    tokens = torch.full((2, 3), first)
    return subject.logits(subject.build(), tokens)


def test_time_that_others_take_does_not_count():
    watch = Stopwatch()
    with alarm(0.2):
        time.sleep(0.5)
    assert watch.seconds < 0.2


def test_work_beyond_the_limit_is_stopped_even_if_it_catches_exceptions():
    watch = Stopwatch()
    with pytest.raises(TimeIsUp, match=r"^0\.2 s of processor time"), alarm(0.2):
        while True:
            with contextlib.suppress(Exception):
                work(0.05)
    assert 0.2 <= watch.seconds < 1


def test_waiting_is_stopped_by_the_clock():
    start = time.monotonic()
    with pytest.raises(TimeIsUp, match=r"^0\.8 s, of which it used 0\.\d+ s of processor time"), alarm(0.2):
        while True:
            time.sleep(0.01)
    assert time.monotonic() - start >= 0.8


def test_a_check_of_a_slow_model_is_not_applicable_and_keeps_what_it_noted(monkeypatch):
    def check_it(subject):
        """A rule."""
        note(seen=1)
        while True:
            try:
                read(subject)
            except Exception:
                fail("a refusal was seen", advice="none")

    found = verdict(check_it, 0.1, monkeypatch, of_check=0.3)
    assert found.outcome == "not_applicable"
    assert "too slow for this check" in found.says and "0.3 s" in found.says
    assert found.evidence["seen"] == 1
    assert found.evidence["limit"] == 0.3 < found.evidence["processor_seconds"] < 3


def test_a_check_that_ends_after_its_last_call_has_its_verdict(monkeypatch):
    def check_it(subject):
        """A rule."""
        read(subject)
        fail("this is wrong", advice="none")

    assert verdict(check_it, 0.2, monkeypatch, of_check=0.1).outcome == "failed"


def test_a_finding_outlives_the_time_to_shrink_it(monkeypatch):
    @drawn(n=st.integers(0, 100))
    def check_it(subject, n):
        """A rule."""
        read(subject)
        if n > 1:
            fail("this is wrong", advice="none")

    assert verdict(check_it, 0.1, monkeypatch, of_check=0.5).outcome == "failed"


def test_a_call_of_a_slow_model_that_is_stopped_is_not_applicable(monkeypatch):
    def check_it(subject):
        """A rule."""
        read(subject)
        read(subject, first=subject.sizes.vocab_size - 1)

    found = verdict(check_it, 0.15, monkeypatch, of_call=0.5)
    assert found.outcome == "not_applicable"
    assert "too slow for this check" in found.says and "0.5 s" in found.says


def test_a_call_of_a_quick_model_that_never_ends_is_an_error(monkeypatch):
    def check_it(subject):
        """A rule."""
        read(subject)
        read(subject, first=subject.sizes.vocab_size - 1)

    found = verdict(check_it, 0.0, monkeypatch, of_call=0.5)
    assert found.outcome == "error"
    assert "still running after 0.5 s" in found.says
    assert found.where.module == "forward"


def test_a_check_that_is_known_to_take_long_may_take_longer(monkeypatch):
    def check_it(subject):
        """A rule."""
        for _ in range(3):
            read(subject)

    check_it.slow = "it trains"
    assert verdict(check_it, 0.1, monkeypatch, of_check=0.1).outcome == "passed"
