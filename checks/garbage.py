"""Garbage collection that does not walk again and again over the half a million objects of the libraries."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OFTEN = 3000  # new objects after which a check collects; Python's own 700 is for programs with less garbage per second


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Inside, only objects made inside are collected, and less often."""
    if gc.get_freeze_count():  # by whoever runs us: `unfreeze` would undo that
        yield
        return
    youngest, *others = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(youngest, OFTEN) if youngest else 0, *others)  # 0: never
    try:
        yield
    finally:
        gc.set_threshold(youngest, *others)
        gc.unfreeze()


def memory_given_back() -> None:
    """Returns memory that nothing holds any more to the system, which the C library else keeps for later."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Inside, nothing is collected: for imports, whose objects stay. Afterwards they count as old."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # both together move every object to the oldest generation, without a walk
            gc.unfreeze()
        if collecting:
            gc.enable()
