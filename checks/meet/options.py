"""Options: what constructors and configurations take beside sizes, other values of it, and where the code reads it."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..expect import Where, shown
from ..subject import Option, Reading
from . import vocabulary
from .configs import key_of
from .sandbox import Sandbox

# How the model computes, what it returns beside logits and how it is trained: such options may leave all numbers alone.
# So may a limit, which only matters beyond it, and an id, which only matters where it is drawn.
NOT_JUDGED = re.compile(
    r"checkpoint|remat|recompute|flash|fused|kernel|triton|compile|cache|offload|device|dtype|precision|backend|impl|"
    r"sdpa|cuda|chunk|parallel|world|shard|quant|inplace|memory|debug|verbose|log|profil|print|seed|version|return|"
    r"output|path|file|dir|name|type$|url|max|limit|len$|length|context|batch|_?ids?$|idx|token|pad|bos|eos|ignore|"
    r"lr$|learning|weight_?decay|beta[s12]*$|momentum|optim|warm_?up|decay|schedul|epoch|step|iter|accum|clip|train|"
    r"eval|smooth|loss|aux|coef|std$|init|temperature|top_?[kp]|sampl|generat|penalty",
    re.IGNORECASE,
)
WINDOW = re.compile(r"window|sliding", re.IGNORECASE)
ANYTHING = re.compile(r"\basdict\b|\bvars\(|__dict__|\bfields\(|model_dump|to_dict|\bastuple\b|\.items\(\)")
FACTORS = (2.0, 0.5, 1e-2, 100.0)  # times the value of an option that is no whole number
SIZABLE = (0.5, 0.1)  # other values: an epsilon of 1e-12 does not show when it is doubled


def options_of(offered: Mapping[str, Any], used: Mapping[str, str], choices: Mapping[str, list[str]]) -> list[Option]:
    """The options among what was offered to constructors, by name and value, that are no sizes and can be judged."""
    found = []
    for name, value in offered.items():
        fixed = name in used or NOT_JUDGED.search(name) or vocabulary.causal(name, value) is not None
        others = () if fixed else _others(value, choices.get(vocabulary.squash(name), []))
        if WINDOW.search(name):  # one of a single token, or none, is another thing than a longer one
            others = tuple(n for n in others if isinstance(n, bool) or not isinstance(n, int) or n > 1)
        if others:
            found.append(Option(name, value, others))
    return found


def _others(value: Any, strings: list[str]) -> tuple[Any, ...]:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        near = (value + 1, 2 * value, value - 1, value // 2, 1, 0)
        return tuple(n for n in dict.fromkeys(near) if n >= 0 and n != value)
    if isinstance(value, float):
        return tuple(n for n in dict.fromkeys((*(value * n for n in FACTORS), *SIZABLE)) if n != value)
    if isinstance(value, str):
        return tuple(dict.fromkeys(text for text in strings if text != value))
    return ()


@contextmanager
def lines_run(sandbox: Sandbox) -> Iterator[set[tuple[str, int]]]:
    """The files and lines of the user's code that run inside."""
    found: set[tuple[str, int]] = set()

    def line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        return line if sandbox.owns(frame.f_code.co_filename) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield found
    finally:
        sys.settrace(before)


@dataclass
class Uses:
    """Where the user's code computes with an option, followed through attributes, variables and arguments.

    To store it or to pass it on is not to compute with it.
    """

    sandbox: Sandbox
    lines: list[tuple[str, int]] = field(default_factory=list)
    declared: list[tuple[str, int]] = field(default_factory=list)
    overwritten: bool = False  # by the class that declares it: computed from other options
    _seen: set[tuple[int, str]] = field(default_factory=set)

    @functools.cached_property
    def trees(self) -> list[tuple[str, ast.Module]]:
        sources = self.sandbox.sources
        return [pair for source in sources.values() for pair in zip(source.filenames, source.trees, strict=False)]

    @functools.cached_property
    def functions(self) -> list[tuple[str, Any, str]]:
        """Of every function: its file, its node, and the name by which it is called: its class's, of a constructor."""
        found: list[tuple[str, Any, str]] = []
        for file, node, parent, _ in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                made = node.name == "__init__" and isinstance(parent, ast.ClassDef)
                found.append((file, node, parent.name if made and isinstance(parent, ast.ClassDef) else node.name))
        return found

    @functools.cached_property
    def nodes(self) -> list[tuple[str, ast.AST, ast.AST, Any]]:
        """Of every node that has one: its file, itself, its parent and the function around it."""
        found: list[tuple[str, ast.AST, ast.AST, Any]] = []

        def walk(file: str, node: ast.AST, around: Any) -> None:
            for child in ast.iter_child_nodes(node):
                found.append((file, child, node, around))
                walk(file, child, child if _is_function(child) else around)

        for file, tree in self.trees:
            walk(file, tree, None)
        return found

    def of(self, name: str) -> Uses:
        for file, node, _, _ in self.nodes:
            target = node.target if isinstance(node, ast.AnnAssign) else None
            if (isinstance(target, ast.Name) and target.id == name) or (isinstance(node, ast.arg) and node.arg == name):
                self.declared.append((file, getattr(node, "lineno", 0)))
        self.overwritten = any(_overwrites(node, name) for _, node, _, _ in self.nodes)
        self.follow_attribute(name)
        for file, function, _ in self.functions:
            self.follow_variable(file, function, name, argument=True)
        return self

    def follow_attribute(self, name: str) -> None:
        """`x.name`, `x["name"]`, `x.get("name")`, `getattr(x, "name")`."""
        if (0, name) in self._seen:
            return
        self._seen.add((0, name))
        for file, node, parent, around in self.nodes:
            attribute = isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.ctx, ast.Load)
            key = key_of(node)
            loaded = key is not None and key[1] == name and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
            softly = isinstance(node, ast.Call) and _softly(node) == name
            if attribute or loaded or softly:
                self.use(file, node, parent, around)

    def follow_variable(self, file: str, function: Any, name: str, *, argument: bool = False) -> None:
        if argument and name not in _arguments(function):
            return
        if (id(function), name) in self._seen:
            return
        self._seen.add((id(function), name))
        for where, node, parent, around in self.nodes:
            if around is function and isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                self.use(where, node, parent, around)

    def use(self, file: str, node: Any, parent: ast.AST, around: Any) -> None:
        if isinstance(parent, ast.Assign) and parent.value is node:
            for target in parent.targets:
                self.stored(file, target, around, node)
        elif isinstance(parent, ast.AnnAssign) and parent.value is node:
            self.stored(file, parent.target, around, node)
        elif isinstance(parent, ast.keyword) and parent.arg is not None:
            takers = [(f, function) for f, function, _ in self.functions if parent.arg in _arguments(function)]
            for taker in takers:
                self.follow_variable(*taker, parent.arg, argument=True)
            self.passed(file, node, bool(takers))
        elif isinstance(parent, ast.Call) and node in parent.args:
            called = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
            place = parent.args.index(node)
            takers = [(f, function) for f, function, name in self.functions if name == called]
            for taker in takers:
                names = [a for a in _arguments(taker[1]) if a != "self"]
                if place < len(names):
                    self.follow_variable(*taker, names[place], argument=True)
            self.passed(file, node, bool(takers))
        else:
            self.lines.append((file, node.lineno))

    def stored(self, file: str, target: Any, around: Any, node: Any) -> None:
        if isinstance(target, ast.Attribute):
            self.follow_attribute(target.attr)
        elif isinstance(target, ast.Name) and around is not None:
            self.follow_variable(file, around, target.id)
        else:
            self.lines.append((file, node.lineno))

    def passed(self, file: str, node: Any, ours: bool) -> None:
        """To a function that is not the user's, an option is given to compute with."""
        if not ours:
            self.lines.append((file, node.lineno))


def _overwrites(node: ast.AST, name: str) -> bool:
    """Whether it is a class that declares an attribute of this name and assigns it in a method."""
    if not isinstance(node, ast.ClassDef):
        return False
    fields = [s.target for s in node.body if isinstance(s, ast.AnnAssign)]
    stored = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return any(isinstance(f, ast.Name) and f.id == name for f in fields) and any(s.attr == name for s in stored)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def _arguments(function: Any) -> list[str]:
    given = function.args
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def _softly(node: ast.Call) -> str:
    """The name in `getattr(x, "name", …)` or `hasattr(x, "name")`."""
    soft = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) > 1
    return str(node.args[1].value) if soft and isinstance(node.args[1], ast.Constant) else ""


def reading_of(name: str, sandbox: Sandbox, run: Callable[[], Any]) -> Reading | None:
    """Where code that `run` runs computes with the option; None if other code may, which `run` does not run.

    Without a place where it is computed with, the option is only declared.
    """
    uses = Uses(sandbox).of(name)
    if not uses.declared or uses.overwritten:
        return None
    with lines_run(sandbox) as ran:
        run()
    places = [place for place in dict.fromkeys(uses.lines) if place in ran]
    if len(places) < len(set(uses.lines)) or (not places and _read_elsewhere(name, sandbox)):
        return None
    file, line = (places or uses.declared)[0]
    return Reading(bool(places), Where(name, "", shown(file), line))


def _read_elsewhere(name: str, sandbox: Sandbox) -> bool:
    """Whether files that import the model's name the option, or any code reads all options at once."""
    if sandbox.file is None:
        return True
    imports = re.compile(rf"^\s*(from|import)\s.*\b{re.escape(sandbox.file.stem)}\b", re.MULTILINE)
    mine = shown(str(sandbox.file))
    for file, text in sandbox.project.texts():
        if file == mine or file in {shown(f) for source in sandbox.sources.values() for f in source.filenames}:
            if ANYTHING.search(text):
                return True
        elif file.endswith((".py", ".ipynb")) and imports.search(text) and re.search(rf"\b{re.escape(name)}\b", text):
            return True
    return False
