"""Known bugs as edits of the text of a foreign form, a module for each part that is wrong.

An edit is a line, or a few, as a careless author would have written them. It fits every form in which all the texts
that it replaces stand exactly once; where several edits of one bug fit a form, the first is made.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..edit import Edit


@cache
def all_edits() -> dict[str, list[Edit]]:
    """The edits of each bug, by its id."""
    found: dict[str, list[Edit]] = {}
    for module in pkgutil.iter_modules(__path__):
        for edit in importlib.import_module(f"{__name__}.{module.name}").EDITS:
            found.setdefault(edit.bug, []).append(edit)
    return found
