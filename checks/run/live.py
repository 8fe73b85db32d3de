"""What a person sees while `check_model` runs: how far it has come, and the first finding as soon as there is one.

Shown where somebody watches: in a notebook's cell, and on standard error where that is a terminal. Nowhere else.
"""

from __future__ import annotations

import sys
from typing import TextIO

WIDTH = 78


def watched() -> TextIO | None:
    """The stream that somebody watches, None where nobody does."""
    if type(sys.stdout).__module__.startswith("ipykernel"):
        return sys.stdout
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else None


class Live:
    """A line that is written over and over; a finding pushes it down."""

    def __init__(self, total: int) -> None:
        self.stream, self.total, self.done = watched(), total, 0
        self.found = False

    def start(self, check: str) -> None:
        self._write(f"\r{f'{self.done} of {self.total} checks · {check}'[:WIDTH]:<{WIDTH}}")
        self.done += 1

    def finding(self, text: str) -> None:
        """Shows the first finding; the report has them all."""
        if not self.found:
            self._write(f"\r{'':<{WIDTH}}\r{text}\n\n")
        self.found = True

    def end(self) -> None:
        self._write(f"\r{'':<{WIDTH}}\r")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()
