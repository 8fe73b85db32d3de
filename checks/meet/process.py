"""Context managers that keep user code from changing or ending our process: settings, exits, output, time.

Each is independent of the others and of a subject; `Sandbox` enters them all.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import pdb
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy
import torch

PRINTED_CHARACTERS = 10_000  # what user code may print before the rest is dropped


class SubjectExit(RuntimeError):
    """The user's code tried to end the process."""


class SubjectHang(RuntimeError):
    """The user's code ran longer than it may."""


class SubjectWaits(RuntimeError):
    """The user's code waits for a person: at a debugger's prompt or for input."""


class TimeIsUp(BaseException):
    """Raised by the alarm; not an Exception, so that an `except Exception` in user code does not swallow it."""


# Settings that code may leave changed for everyone: how to read one and how to write it.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
    ),
    "the default device": (torch.get_default_device, lambda device: torch.set_default_device(_unset_for_cpu(device))),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "the precision of matrix products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
    ),
    "the working directory": (os.getcwd, os.chdir),
}  # fmt: skip


def _unset_for_cpu(device: torch.device) -> torch.device | None:
    """The CPU is the default when no default is set."""
    return None if device.type == "cpu" else device


@contextlib.contextmanager
def settings_restored(changed: list[str]) -> Iterator[None]:
    """Restores the global settings afterwards, and appends the names of those that differed to `changed`."""
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    try:
        yield
    finally:
        for name, (read, write) in SETTINGS.items():
            if read() != before[name]:
                if name not in changed:
                    changed.append(name)
                write(before[name])


@contextlib.contextmanager
def random_state_restored() -> Iterator[None]:
    """Restores the random state of torch, NumPy and `random`, the environment and the warning filters afterwards."""
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    environment, filters = dict(os.environ), warnings.filters[:]
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]


@contextlib.contextmanager
def exits_refused() -> Iterator[None]:
    """`os._exit`, debugger prompts and `input()` raise. `sys.exit` raises by itself: see `Sandbox.__exit__`."""
    real, process = os._exit, os.getpid()

    def refuse(status: int = 0) -> Any:
        if os.getpid() != process:  # a forked worker ends as it always does
            real(status)
        raise SubjectExit(f"your code called os._exit({status!r})")

    def wait(*args: Any, **kwargs: Any) -> Any:
        raise SubjectWaits("your code waits for a debugger or for input, and nobody is there to answer")

    prompts = (sys, "breakpointhook"), (pdb, "set_trace"), (builtins, "input")
    before = [getattr(place, name) for place, name in prompts]
    os._exit = refuse
    for place, name in prompts:
        setattr(place, name, wait)
    try:
        yield
    finally:
        os._exit = real
        for (place, name), function in zip(prompts, before, strict=True):
            setattr(place, name, function)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp after this many seconds, if possible: on the main thread of a Unix system."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, ring)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)


class Output:
    """Bounds what user code prints: the first characters pass, the rest is dropped. Counts over all its uses."""

    def __init__(self) -> None:
        self.printed = 0

    @contextlib.contextmanager
    def bounded(self) -> Iterator[None]:
        streams = sys.stdout, sys.stderr
        mine = tuple(_Bounded(stream, self) for stream in streams)
        sys.stdout, sys.stderr = mine
        try:
            yield
        finally:
            if sys.stdout is mine[0]:
                sys.stdout = streams[0]
            if sys.stderr is mine[1]:
                sys.stderr = streams[1]


class _Bounded:
    """A stream that lets the first characters through and then says that it drops the rest."""

    def __init__(self, stream: Any, output: Output) -> None:
        self._stream, self._output = stream, output

    def write(self, text: str) -> int:
        room = PRINTED_CHARACTERS - self._output.printed
        self._output.printed += len(text)
        if room > 0:
            self._stream.write(text[:room])
            if len(text) > room:
                self._stream.write(f"\n[more than {PRINTED_CHARACTERS} characters printed: the rest is dropped]\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
