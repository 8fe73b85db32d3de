"""Context managers that keep user code from changing or ending our process: settings, exits, output, time.

Each is independent of the others and of a subject; `Sandbox` enters them all.

Time is processor time of the thread that runs the code, so that no other load on the machine makes a model fail. A call
may take `sandbox.RUNNING_SECONDS`. One that has to be stopped never ends, which is an error (SubjectHang), unless the
model is slow: each of its calls for logits so far took at least SLOW_CALL. A check may take CHECK_SECONDS, after which
the model is not called again. A model that is only slow is not applicable (TooSlow).
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
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import numpy
import torch

from ..expect import TooSlow

PRINTED_CHARACTERS = 10_000  # what user code may print before the rest is dropped
CHECK_SECONDS = 30.0  # of processor time for one check
LONG_CHECK_SECONDS = 300.0  # for one that trains until a text is learned, is asked for as slow, or has a large model
SLOW_CALL = 0.1  # seconds of processor time; a small model takes a few milliseconds
WAITING = 4  # times a limit, by the clock, are as long as code may wait that hardly uses the processor
HARDLY = 0.05  # of the processor: under `pytest -n 8` on two busy cores, a process still has more


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


class Stopwatch:
    """Processor time of this thread since it was made, and whether a limit for it is over.

    For code that waits (sleeps, or wants a lock) the limit is over as well when WAITING times as much has gone by.
    """

    def __init__(self) -> None:
        self._processor, self._clock = time.thread_time(), time.monotonic()

    @property
    def seconds(self) -> float:
        return time.thread_time() - self._processor

    def over(self, limit: float) -> bool:
        return self.seconds >= limit or self.waited(limit)

    def waited(self, limit: float) -> bool:
        gone = time.monotonic() - self._clock
        return gone >= WAITING * limit and self.seconds < HARDLY * gone

    def says(self, limit: float) -> str:
        if self.waited(limit):
            return f"{WAITING * limit:g} s, of which it used {self.seconds:.2g} s of processor time"
        return f"{limit:g} s of processor time"


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp when this limit is over, if possible: on the main thread of a Unix system."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    watch = Stopwatch()

    def ring(number: int, frame: FrameType | None) -> None:
        if watch.over(seconds):
            raise TimeIsUp(watch.says(seconds))  # and again every second, should the code catch it
        signal.setitimer(signal.ITIMER_REAL, max(seconds - watch.seconds, 0.01), 1.0)

    handler = signal.signal(signal.SIGALRM, ring)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)


_check: ContextVar[tuple[Stopwatch, float] | None] = ContextVar("check", default=None)


@contextlib.contextmanager
def limited_check(*, long: bool) -> Iterator[None]:
    """Surrounds a check, which may take CHECK_SECONDS, or more if it is a long one."""
    token = _check.set((Stopwatch(), LONG_CHECK_SECONDS if long else CHECK_SECONDS))
    try:
        yield
    finally:
        _check.reset(token)


def in_a_check() -> bool:
    return _check.get() is not None


def refuse_if_too_slow() -> None:
    """Raises TooSlow where the time of the check that is running is over."""
    running = _check.get()
    if running is not None and running[0].over(running[1]):
        watch, limit = running
        raise TooSlow(
            f"{watch.seconds:.3g} s of processor time so far, allowed {watch.says(limit)}",
            processor_seconds=round(watch.seconds, 3), limit=limit,
        )  # fmt: skip


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
