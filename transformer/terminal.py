"""A training and its terminal: Ctrl-C, and a progress bar once it takes long."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, TextIO


class Interruption:
    """Inside, Ctrl-C only sets `asked`, so that the current step is finished; a second Ctrl-C stops at once."""

    REPEAT = 1.0  # seconds within which a second signal is the same Ctrl-C, passed on by torchrun

    def __init__(self) -> None:
        self.asked = False
        self.at = 0.0

    def __enter__(self) -> Interruption:
        self.outside: Any = None
        if threading.current_thread() is threading.main_thread():  # no other thread may handle signals
            self.outside = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.outside is not None:
            signal.signal(signal.SIGINT, self.outside)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.at > self.REPEAT:
            raise KeyboardInterrupt
        self.asked, self.at = True, time.monotonic()


class Progress:
    """A bar of the steps done, on a terminal and only once there is something to wait for."""

    DELAY = 2.0  # seconds

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self.steps, self.stream = steps, stream or sys.stderr
        self.bar: Any = None

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, loss: float) -> None:
        if self.bar is None and self.due():
            self.bar = self.open()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, description=f"loss {loss:.3g}")

    def due(self) -> bool:
        return self.stream.isatty() and time.monotonic() - self.started >= self.DELAY

    def open(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Bar(*columns, console=Console(file=self.stream))
        bar.add_task("", total=self.steps)
        bar.start()
        return bar
