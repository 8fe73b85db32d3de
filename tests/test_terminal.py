"""The terminal: a bar only where somebody waits for it, and Ctrl-C once or twice."""

from __future__ import annotations

import io
import signal
import threading

import pytest

from transformer_checks.transformer.terminal import Interruption, Progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "delay", "drawn"),
    [(Screen, 0.0, True), (Screen, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["terminal", "short training", "file"],
)
def test_a_bar_is_drawn_on_a_terminal_and_only_after_a_while(monkeypatch, stream, delay, drawn):
    monkeypatch.setattr(Progress, "DELAY", delay)
    monkeypatch.setenv("TERM", "xterm")
    screen = stream()
    with Progress(7, screen) as progress:
        progress.update(3, 0.123456)
    assert bool(screen.getvalue()) == drawn
    if drawn:
        assert "0.123" in screen.getvalue() and "3/7" in screen.getvalue()


def test_a_training_of_two_seconds_has_no_bar():
    assert Progress.DELAY == 2.0


def test_ctrl_c_is_a_request_and_a_second_one_an_order(monkeypatch):
    outside = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert not interruption.asked
        signal.raise_signal(signal.SIGINT)
        assert interruption.asked
        signal.raise_signal(signal.SIGINT)  # at once: torchrun repeating what the terminal sent
        monkeypatch.setattr(Interruption, "REPEAT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is outside


def test_in_another_thread_signals_are_left_alone():
    outside = signal.getsignal(signal.SIGINT)
    found = []

    def work():
        with Interruption() as interruption:
            found.append((interruption.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, outside)]
