"""The code of one of the user's modules as syntax trees."""

from __future__ import annotations

import ast
import contextlib
import functools
from dataclasses import dataclass
from typing import Any

from .definitions import is_main_guard


@dataclass
class Source:
    """The code of one module: a tree for a file, one a cell for a notebook."""

    trees: tuple[ast.Module, ...]
    filenames: tuple[str, ...]

    @property
    def body(self) -> list[ast.stmt]:
        return [statement for tree in self.trees for statement in tree.body]

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return [node for tree in self.trees for node in ast.walk(tree)]

    @functools.cached_property
    def guarded(self) -> dict[str, Any]:
        """Literals assigned under `if __name__ == "__main__":`, which an import does not run."""
        found = {}
        for statement in self.body:
            for node in statement.body if isinstance(statement, ast.If) and is_main_guard(statement) else ():
                if isinstance(node, ast.Assign):
                    with contextlib.suppress(ValueError):
                        value = ast.literal_eval(node.value)
                        found.update({t.id: value for t in node.targets if isinstance(t, ast.Name)})
        return found

    def assigns(self, name: str) -> bool:
        """Whether the module's own code gives the name a value."""
        return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in self.nodes)

    @functools.cached_property
    def free_names(self) -> tuple[str, ...]:
        """Names that functions read but do not define: globals."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                stored = {n.id for n in named if not isinstance(n.ctx, ast.Load)}
                stored |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
                found |= {n.id for n in named if isinstance(n.ctx, ast.Load)} - stored
        return tuple(sorted(found))
