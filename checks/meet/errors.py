"""UsageError, and where in the user's own code an exception came from."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..report.paths import shown

if TYPE_CHECKING:
    from .sandbox import Sandbox


class UsageError(ValueError):
    """The user's mistake, or a choice that only they can make: says where, what was found and how to fix it."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the message without a traceback through our code."""
        return str(self).splitlines()


def own_frames(error: BaseException, sandbox: Sandbox) -> Iterator[traceback.FrameSummary]:
    """The frames of the user's own code that an exception went through, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return (frame for frame in frames if sandbox.owns(frame.filename))


def place(error: BaseException, sandbox: Sandbox) -> str:
    """`model.py:12`, the last line of the user's own code that the exception went through; "" if none."""
    if isinstance(error, SyntaxError) and error.filename and sandbox.owns(error.filename):
        return f"{shown(error.filename)}:{error.lineno}"
    frames = list(own_frames(error, sandbox))
    return f"{shown(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""


def what_happened(error: BaseException, sandbox: Sandbox) -> str:
    """`model.py:12: self.head = nn.Linear(n, m) raised TypeError: …`."""
    where, frames = place(error, sandbox), list(own_frames(error, sandbox))
    said = str(error).strip() or "no message"
    said = said if len(said) < 400 else said[:400] + " …"
    ours = type(error).__module__.startswith(__name__.removesuffix(".meet.errors"))
    said = said if ours else f"{type(error).__name__}: {said}"
    if isinstance(error, SyntaxError):
        return f"{where}: {type(error).__name__}: {error.msg}" + (f"\n    {error.text.strip()}" if error.text else "")
    line = f"\n    {frames[-1].line}" if frames and frames[-1].line else ""
    return (f"{where}: {said}{line}" if where else said) + _taken_name(str(error), sandbox)


def _taken_name(said: str, sandbox: Sandbox) -> str:
    """For a user's file with the name of a module of the standard library: how to get at it."""
    name = namesake(said, sandbox)
    if not name:
        return ""
    return f"\n  import {name} loads the standard library's {name}: give {name}.py beside it another name"


def namesake(said: str, sandbox: Sandbox) -> str:
    """The module of the standard library that was searched for a name, if a file beside the user's has its name too."""
    found = re.search(r"cannot import name '\w+' from '(\w+)'|module '(\w+)' has no attribute", said)
    name = found and (found[1] or found[2])
    beside = [folder for folder in sandbox.near if name and (folder / f"{name}.py").is_file()]
    return name if name and beside and name in sys.stdlib_module_names else ""
