"""What a file defines and no check calls: a training loop, a merge of adapters, a second way of decoding.

A green run says nothing about these. Found in the source text alone: a name that is mentioned in what is called counts
as called, so that nothing is named here which a check may have run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .definitions import definitions, is_main_guard, is_script
from .source import Source
from .vocabulary import MAKES_ITS_OPTIMIZER

if TYPE_CHECKING:
    from .loaded import Loaded

WORD = re.compile(r"\w+")
CALLED = frozenset(
    {"forward", "generate", "train", "eval", "state_dict", "load_state_dict", "reset_parameters", *MAKES_ITS_OPTIMIZER}
)
ENTRY = frozenset({"main", "build_model", "extra_repr"})  # start a script, or only say something
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class _Defined:
    """A function, a method or a class, and the names that its body mentions."""

    name: str
    line: int
    within: str  # the class of a method
    mentions: frozenset[str]

    def __str__(self) -> str:
        return f"{self.within}.{self.name}" if self.within else self.name


def uncalled(source: Source, roots: Iterable[str]) -> dict[str, int]:
    """Functions, methods and classes that nothing reaches from the roots or the import, as written, with their line."""
    defined = list(_defined(source))
    reached = {*roots, *CALLED, *_mentioned(_imported(source))}
    left = defined
    while True:
        now = [one for one in left if _reached(one, reached)]
        if not now:
            break
        left = [one for one in left if one not in now]
        reached = reached.union(*(one.mentions for one in now))
    unreached = {one.name for one in left if not one.within}
    return {str(one): one.line for one in left if one.within not in unreached and _is_told(one.name)}


def uncalled_in(loaded: Loaded, source: Source) -> dict[str, int]:
    """The same of a model that was met: checks call it, its cache, and its parts."""
    said = " ".join([loaded.shown, loaded.constructor, loaded.protocol.says if loaded.protocol else ""])
    roots = {*WORD.findall(said)}
    for part in loaded.parts.values():
        if callable(part) and hasattr(part, "__name__"):
            roots.add(part.__name__)
        elif hasattr(part, "encode"):
            roots.add(type(part).__name__)
    roots |= {word for made in loaded.parts.get("batches", list)() for word in WORD.findall(made.maker)}
    named = {one.name for one in loaded.parts.get("companions", ())}  # elsewhere, whether or not one is judged
    found = uncalled(source, roots | named)
    return {name: line for name, line in found.items() if name.partition(".")[0] not in named}


def _is_told(name: str) -> bool:
    return not name.startswith("_") and name not in ENTRY


def _reached(one: _Defined, reached: set[str]) -> bool:
    if one.within and one.within not in reached:
        return False
    return one.name in reached or (bool(one.within) and one.name.startswith("__"))


def _defined(source: Source) -> Iterator[_Defined]:
    for node in source.body:
        if isinstance(node, Function):
            yield _Defined(node.name, node.lineno, "", _mentioned([node]))
        elif isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, Function)]
            rest = [inner for inner in node.body if not isinstance(inner, Function)]
            outer = [*node.bases, *node.decorator_list, *(word.value for word in node.keywords)]
            yield _Defined(node.name, node.lineno, "", _mentioned([*rest, *outer]))
            for method in methods:
                yield _Defined(method.name, method.lineno, node.name, _mentioned([method]))


def _imported(source: Source) -> list[ast.stmt]:
    """The statements that run when the file is imported, without definitions; of a script, the work is left out."""
    run = [node for tree in source.trees for node in (definitions(tree) if is_script(tree) else tree).body]
    return [node for node in run if not isinstance(node, Function | ast.ClassDef) and not is_main_guard(node)]


def _mentioned(nodes: Iterable[ast.AST]) -> frozenset[str]:
    """Every name, attribute and text in them: `getattr(model, "merge")` mentions merge."""
    found = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return frozenset(found)
