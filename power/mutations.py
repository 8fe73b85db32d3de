"""Makes mutants of a source file: copies of it with one small change, such as a swapped operand or a shifted slice."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

OTHER: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
REMOVED: dict[type, str] = {ast.Not: "`not`", ast.USub: "minus sign", ast.Invert: "`~`"}
NOT_COMMUTATIVE = (ast.Sub, ast.Div, ast.FloorDiv, ast.MatMult, ast.Pow)


@dataclass(frozen=True)
class Mutant:
    """A copy of the source in which `old`, at `line` and `column`, is replaced by `new`."""

    kind: str
    line: int
    column: int
    old: str
    new: str
    function: int  # first line of the innermost function around it; 0 outside all functions
    source: str  # the whole file with the change

    @property
    def id(self) -> str:
        return f"{self.line}:{self.column}:{self.kind}:{hashlib.sha1(self.new.encode()).hexdigest()[:8]}"

    def __str__(self) -> str:
        return f"line {self.line}, {self.kind}: {_short(self.old)} → {_short(self.new)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"


def mutants(source: str) -> list[Mutant]:
    """Every mutant that compiles and is another program, in the order of the source."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    for node, function in _code(tree):
        for kind, new in _changes(node):
            mutant = _mutant(source, node, function, (kind, new))
            if mutant is not None:
                found.setdefault(mutant.id, mutant)
    return sorted(found.values(), key=lambda m: (m.line, m.column))


def _code(tree: ast.Module) -> Iterator[tuple[ast.AST, int]]:
    """The nodes inside functions and classes, each with the first line of its function.

    Annotations, decorators, assertions, raised errors and f-strings are left out.
    """
    for top in tree.body:
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            yield from _inside(top, 0)


def _inside(node: ast.AST, function: int) -> Iterator[tuple[ast.AST, int]]:
    yield node, function
    if isinstance(node, ast.FunctionDef):
        function = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert | ast.Raise | ast.JoinedStr):
                yield from _inside(child, function)


def _mutant(source: str, node: ast.AST, function: int, change: tuple[str, str]) -> Mutant | None:
    kind, new = change
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    start = len("".join(lines[:first])) + _characters(lines[first], node.col_offset)  # type: ignore[attr-defined]
    end = len("".join(lines[:last])) + _characters(lines[last], node.end_col_offset)  # type: ignore[attr-defined]
    changed = source[:start] + new + source[end:]
    try:
        compile(changed, "mutant", "exec")
    except SyntaxError:
        return None
    column: int = node.col_offset  # type: ignore[attr-defined]
    mutant = Mutant(kind, first + 1, column, source[start:end], new, function, changed)
    return None if meaning(changed) == meaning(source) else mutant


def distinct(found: Iterable[Mutant]) -> list[Mutant]:
    """The first of all mutants that are the same program written in different ways."""
    programs: dict[str, Mutant] = {}
    for mutant in found:
        programs.setdefault(meaning(mutant.source), mutant)
    return list(programs.values())


@functools.lru_cache(maxsize=4096)
def meaning(source: str) -> str:
    """A hash of the program, the same for sources that differ only in how they are written."""
    return hashlib.sha1(ast.dump(_Plain().visit(ast.parse(source))).encode()).hexdigest()


class _Plain(ast.NodeTransformer):
    """Normalizes a program: an expression statement without a call becomes `pass`; `not not x` in a condition becomes
    `x`; `not (a is b)` becomes `a is not b`, and likewise for `in`.
    """

    OPPOSITE: ClassVar[dict[type, type]] = {
        ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In
    }  # fmt: skip

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        acts = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
        return self.generic_visit(node) if any(isinstance(n, acts) for n in ast.walk(node)) else ast.Pass()

    def visit_If(self, node: ast.If | ast.While | ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        while _negation(node.test) and _negation(node.test.operand):  # type: ignore[attr-defined]
            node.test = node.test.operand.operand  # type: ignore[attr-defined]
        return node

    visit_While = visit_IfExp = visit_If

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        inner = node.operand
        if _negation(node) and isinstance(inner, ast.Compare) and [type(o) in self.OPPOSITE for o in inner.ops] == [1]:
            return ast.Compare(inner.left, [self.OPPOSITE[type(inner.ops[0])]()], inner.comparators)
        return node


def _negation(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def _characters(line: str, column: int) -> int:
    """The column in characters; ast counts bytes."""
    return len(line.encode()[:column].decode())


def _changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The changes of a node: what kind it is, and the new text."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OTHER:
        yield "operator replaced", _with(node, op=OTHER[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, NOT_COMMUTATIVE):
        yield "operands swapped", f"({_with(node, left=node.right, right=node.left)})"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield "comparison replaced", _with(node, ops=[OTHER[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.BoolOp):
        yield "and/or exchanged", f"({_with(node, op=OTHER[type(node.op)]())})"
    if isinstance(node, ast.Constant):
        yield from _constants(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield f"{REMOVED[type(node.op)]} removed", f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.IfExp):
        yield "branches swapped", f"({_with(node, body=node.orelse, orelse=node.body)})"
    if isinstance(node, ast.Call):
        yield from _calls(node)
    if isinstance(node, ast.Slice):
        yield from _slices(node)
    if isinstance(node, ast.Assign | ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement dropped", "pass"
    if isinstance(node, ast.AugAssign):
        yield "augmented assignment made plain", f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"


def _with(node: ast.AST, **fields: object) -> str:
    changed = deepcopy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return ast.unparse(ast.fix_missing_locations(changed))


def _constants(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, bool):
        yield "boolean flipped", str(not value)
    elif isinstance(value, int):
        yield "constant + 1", f"({value + 1})"
        yield "constant - 1", f"({value - 1})"
    elif isinstance(value, float):
        yield "constant × 2", repr(value * 2)
        yield "constant + 1", repr(value + 1)


def _calls(call: ast.Call) -> Iterator[tuple[str, str]]:
    plain = [a for a in call.args if not isinstance(a, ast.Starred)]
    for index in range(len(plain) - 1):
        args = list(call.args)
        args[index], args[index + 1] = args[index + 1], args[index]
        yield "arguments swapped", _with(call, args=args)
    for index, keyword in enumerate(call.keywords):
        if keyword.arg is not None:
            others = call.keywords[:index] + call.keywords[index + 1 :]
            yield f"argument {keyword.arg} dropped", _with(call, keywords=others)
    if plain and not isinstance(plain[0], ast.Constant | ast.GeneratorExp):
        yield "call replaced by its argument", f"({ast.unparse(plain[0])})"
    if isinstance(call.func, ast.Attribute) and not isinstance(call.func.value, ast.Name):
        yield "method call dropped", f"({ast.unparse(call.func.value)})"
    elif (
        isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id != "self"
    ):
        yield "method call dropped", f"({call.func.value.id})"


def _slices(node: ast.Slice) -> Iterator[tuple[str, str]]:
    for side in ("lower", "upper"):
        bound = getattr(node, side)
        if bound is not None:
            for sign in "+-":
                shifted = ast.parse(f"({ast.unparse(bound)}) {sign} 1", mode="eval").body
                yield f"slice {sign} 1", _with(node, **{side: shifted})


def negated(source: str) -> Iterator[Mutant]:
    """Mutants that negate the condition of an `if`, `while` or conditional expression."""
    for node, function in _code(ast.parse(source)):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            change = ("condition negated", f"(not ({ast.unparse(node.test)}))")
            mutant = _mutant(source, node.test, function, change)
            if mutant is not None:
                yield mutant
