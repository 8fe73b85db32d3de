"""Imports of large libraries without garbage collection."""

from __future__ import annotations

import gc
import sys
from importlib import import_module


def import_for_good(*modules: str) -> bool:
    """Imports modules that stay until the process ends. Returns whether any was not there yet.

    torch makes a quarter of a million objects, over which the collector would walk again and again while they are
    made. They are moved to the oldest generation without a walk.
    """
    if all(module in sys.modules for module in modules):
        return False
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    try:
        for module in modules:
            import_module(module)
    finally:
        if not frozen:  # by whoever runs us: `unfreeze` would undo that
            gc.freeze()
            gc.unfreeze()
        if collecting:
            gc.enable()
    return True
