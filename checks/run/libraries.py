"""Imports of large libraries without garbage collection."""

from __future__ import annotations

import sys
from importlib import import_module

from ..garbage import nothing_collected


def import_for_good(*modules: str) -> bool:
    """Imports modules that stay until the process ends. Returns whether any was not there yet.

    torch makes a quarter of a million objects, over which the collector would walk again and again while they are
    made.
    """
    if all(module in sys.modules for module in modules):
        return False
    with nothing_collected():
        for module in modules:
            import_module(module)
    return True
