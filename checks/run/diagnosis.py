"""What to make of the failures of a run: which one to look at first, and what its likely causes are."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..report.terminal import place
from . import BROKEN
from .order import CHECKS


def where_to_start(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Which of the broken rules to look at first: a crash, otherwise the first in the order of the checks."""
    broken = [verdict for verdict in verdicts if verdict["outcome"] in BROKEN]
    if not broken:
        return ""
    first = next((verdict for verdict in broken if verdict["outcome"] == "error"), broken[0])
    at = f" at {place(first['where'])}" if first.get("where") else ""
    return f"start with {first['check']}{at}" if len(broken) > 1 else f"{first['check']}{at}"


def explain(bug: str) -> str:
    """A known bug's id with what it is."""
    says = _says(bug)
    return f"{bug}: {says}" if says else bug


@cache
def _says(bug: str) -> str:
    """What a known bug is, from its source text: to import them all, and all checks with them, takes a second."""
    name = bug.replace("-", "_")
    for path in sorted((CHECKS / "bugs").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if f"def {name}(" in text or f'"{bug}"' in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef):
                    for made in node.decorator_list:
                        if isinstance(made, ast.Call) and made.args and bug == _id(made, node.name):
                            return str(ast.literal_eval(made.args[0]))
    return ""


def _id(made: ast.Call, name: str) -> str:
    """The id that `@bug(…)` gives a function of this name."""
    given = (word.value for word in made.keywords if word.arg == "id")
    return str(ast.literal_eval(next(given, ast.Constant(name.replace("_", "-")))))
