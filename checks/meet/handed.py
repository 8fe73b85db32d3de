"""Whether the user's own code gives the model an argument that has a default: most callers leave such a one out.

What a model forgets must not be added by whoever judges it; what its own callers add is part of how it is used.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

MODELS = re.compile(r"model|gpt|net$|llm|^lm$|^m$", re.IGNORECASE)  # what callers name a model
FILES = 60  # that are searched, at most: those beside the model's first
LARGEST = 200_000  # bytes of a file


def handed_over(model: nn.Module, name: str) -> str | None:
    """`train.py:40`, the first call of the model in the user's code that gives this argument; None if none does."""
    try:
        own = Path(inspect.getfile(type(model)))
    except (TypeError, OSError):  # made in a notebook or by exec
        return None
    index = _index(model, name)
    for file in itertools.islice(_beside(own), FILES):
        for call in _calls(file, type(model).__name__, own):
            if _gives(call, name, index):
                return f"{file.name}:{call.lineno}"
    return None


def _index(model: nn.Module, name: str) -> int:
    """The place of the argument among those of forward."""
    return list(inspect.signature(model.forward).parameters).index(name)


def _beside(own: Path) -> Iterator[Path]:
    """The model's own file, those beside it and those one folder up or down."""
    yield own
    near = (sorted(folder.glob(pattern)) for folder, pattern in ((own.parent, "*.py"), (own.parent, "*/*.py")))
    for file in itertools.chain(*near, sorted(own.parent.parent.glob("*.py"))):
        if file != own:
            yield file


def _calls(file: Path, cls: str, own: Path) -> Iterator[ast.Call]:
    """Calls of what is named like a model, outside `forward`, in a file that mentions the model's class or module."""
    try:
        if file.stat().st_size > LARGEST:
            return
        text = file.read_text(encoding="utf-8")
        if file != own and cls not in text and own.stem not in text:
            return
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "forward"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside and _of_a_model(node.func):
            yield node


def _of_a_model(called: ast.expr) -> bool:
    """`model(…)`, `self(…)`, `self.model(…)`, `model.forward(…)`."""
    if isinstance(called, ast.Attribute) and called.attr == "forward":
        called = called.value
    if isinstance(called, ast.Name):
        return called.id == "self" or (bool(MODELS.search(called.id)) and not called.id[0].isupper())
    return isinstance(called, ast.Attribute) and bool(MODELS.search(called.attr))


def _gives(call: ast.Call, name: str, index: int) -> bool:
    given = [keyword.value for keyword in call.keywords if keyword.arg == name]
    if index < len(call.args) and not any(isinstance(argument, ast.Starred) for argument in call.args):
        given.append(call.args[index])
    return any(not (isinstance(value, ast.Constant) and value.value is None) for value in given)
