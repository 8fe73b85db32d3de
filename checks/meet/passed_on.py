"""What a constructor must be given for others: the parameters of the parts to which it passes its `**kwargs` on."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .arguments import Parameter, signature_of
from .sandbox import Sandbox
from .vocabulary import MISSING


def passed_on(target: Callable[..., Any], scope: Mapping[str, Any], sandbox: Sandbox) -> tuple[Parameter, ...]:
    """The parameters of every part that is made with the keywords of this one, those that it is given apart left out.

    One with a default is left out too where another of the parts would not take it.
    """
    found: dict[str, Parameter] = {}
    todo, seen = [target], {target}
    for maker in todo:
        parts = list(_made_by(maker, scope, sandbox))
        takes = [signature_of(part) for part, _ in parts]
        for (part, given), taken in zip(parts, takes, strict=True):
            for parameter in taken.parameters:
                name, optional = parameter.name, parameter.default is not MISSING
                refused = optional and not all(name in other or other.takes_anything for other in takes)
                if name not in given and not refused and (name not in found or not optional):
                    found[name] = parameter
            if taken.takes_anything and part not in seen:
                seen.add(part)
                todo.append(part)
    return tuple(found.values())


def _made_by(
    maker: Callable[..., Any], scope: Mapping[str, Any], sandbox: Sandbox
) -> Iterator[tuple[Callable[..., Any], set[str]]]:
    """Each part that a constructor or a function calls with its `**kwargs`, and what it is given beside them."""
    for node in _code_of(maker, sandbox):
        if node.args.kwarg is None:
            continue
        for call in ast.walk(node):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            spread = any(k.arg is None and _named(k.value) == node.args.kwarg.arg for k in call.keywords)
            part = scope.get(call.func.id)
            if spread and (inspect.isclass(part) or inspect.isfunction(part)):
                in_order = [p.name for p in signature_of(part).parameters][: len(call.args)]
                yield part, {*in_order, *(k.arg for k in call.keywords if k.arg is not None)}


def _named(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _code_of(maker: Callable[..., Any], sandbox: Sandbox) -> Iterator[ast.FunctionDef]:
    """The user's constructor or function of that name."""
    for source in sandbox.sources.values():
        for node in source.nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == maker.__name__:
                if isinstance(node, ast.FunctionDef):
                    yield node
                else:
                    yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
