"""Places in the subject's code: the file and line of a module's forward, and the line that is running now."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import nn

from ..expect import Where, shown

TORCH = str(Path(torch.__file__).parent)
OURS = str(Path(__file__).parent.parent)


def locate(model: nn.Module, name: str) -> Where:
    """A module's class, and the file and line of its forward.

    For one of PyTorch's modules it is the line that uses it, in the forward of the subject's module around it.
    """
    module, owner, attribute = _walk(model, name)
    file, line = _line(owner, attribute)
    return Where(name, type(module).__name__, file, line)


def owner_of(model: nn.Module, parameter: str) -> Where:
    """The module that holds the parameter of this name."""
    return locate(model, parameter.rpartition(".")[0] or type(model).__name__)


def _walk(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module, str]:
    """The module, the innermost module around it that is not PyTorch's, and the attribute leading from there to it."""
    module, owner, attribute = model, model, ""
    parts = [] if name == type(model).__name__ else name.split(".")
    for part in parts:
        if owner is module:
            attribute = part
        module = module.get_submodule(part)
        if not type(module).__module__.startswith("torch."):
            owner, attribute = module, ""
    return module, owner, attribute


def _line(owner: nn.Module, attribute: str) -> tuple[str, int]:
    function = inspect.unwrap(type(owner).forward)
    code = getattr(function, "__code__", None)
    if code is None:
        return "", 0
    line = code.co_firstlineno
    if attribute:
        try:
            source = inspect.getsourcelines(code)[0]
        except (OSError, TypeError):
            source = []
        mentions = [n for n, text in enumerate(source) if f"self.{attribute}" in text]
        line += mentions[0] if mentions else 0
    return shown(code.co_filename), line


def line_now(names: Mapping[int, str] = MappingProxyType({})) -> Where | None:
    """The line of the subject's own code that is running: the innermost frame outside PyTorch and the checks.

    `names` maps ids of modules to their names. The innermost running module in it is named, otherwise the function.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH, "<")) and not _is_ours(file):
            owner = _running(frame, names) or frame.f_locals.get("self")
            kind = type(owner).__name__ if owner is not None else ""
            return Where(names.get(id(owner)) or frame.f_code.co_name, kind, shown(file), frame.f_lineno)
        frame = frame.f_back
    return None


def _running(frame: FrameType | None, names: Mapping[int, str]) -> Any:
    """The innermost module among `names` with a method in this frame or in one that called it."""
    while frame is not None and names:
        owner = frame.f_locals.get("self")
        if names.get(id(owner)):
            return owner
        frame = frame.f_back
    return None


def called_by_checks() -> bool:
    """Whether the function that calls this one was itself called by a check, rather than by the subject."""
    return _is_ours(sys._getframe(2).f_code.co_filename)


def _is_ours(file: str) -> bool:
    """Whether a file belongs to the checks. Known bugs do not count: they stand for the subject's code."""
    return file.startswith(OURS) and not file.startswith(os.path.join(OURS, "bugs"))
