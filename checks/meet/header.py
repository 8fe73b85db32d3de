"""The line of facts about a subject met: how it is built and called, what it has, and what was assumed."""

from __future__ import annotations

import ast
import contextlib
from typing import TYPE_CHECKING

import torch

from . import vocabulary
from .sandbox import Sandbox

if TYPE_CHECKING:
    from .met import Met

ASSIGNABLE = (bool, int, float, str, torch.dtype, type(None))


def header_of(met: Met) -> str:
    """The line of facts: what was met, how it is built and called, what it has, what was assumed."""
    ignored = ignored_index(met.sandbox)
    facts = [
        met.shown,
        met.constructor,
        f"{met.forward.way.says} → {met.forward.returns}",
        *([f"ignore_index {ignored}"] if ignored is not None else []),
        f"generate {'✓' if _generates(met) else '✗'}",
        f"cache ✓ ({met.protocol.says})" if met.protocol else "cache ✗",
        *([f"padding mask: {met.mask_forms[0]}"] if met.mask_forms else []),
        *([f"brings {', '.join(sorted(met.parts))}"] if met.parts else []),
        *([met.returns] if met.returns != "logits" else []),
    ]
    put_back = [f"{name} was changed: put back" for name in met.sandbox.changed]
    assumed = [*_values(met), *met.sandbox.remarks, *met.forward.assumed, *met.assumed, *put_back]
    return " · ".join(facts + ([f"assumed: {'; '.join(assumed)}"] if assumed else []))


def _values(met: Met) -> list[str]:
    """What the constructor was given that is no size."""
    given = met.recipe.assumed if met.recipe is not None else {}
    told = [f"{name}={value!r}" for name, value in given.items() if isinstance(value, ASSIGNABLE)]
    padding = [n for n in given if vocabulary.squash(n) in vocabulary.PADDING]
    unused = [f"{padding[0]} is an id that no check uses"] if padding else []
    places = met.recipe.places if met.recipe is not None else {}
    as_there = [f"{name} is as in {places[name]}" for name in given if name in places]
    return ([", ".join(told[:8]) + ", …" * (len(told) > 8)] if told else []) + unused + as_there


def _generates(met: Met) -> bool:
    return "generate" in met.parts or met.has_generate


def ignored_index(sandbox: Sandbox) -> int | None:
    """The `ignore_index=` that the subject's code passes to a loss."""
    for source in (source for name, source in sandbox.sources.items() if name not in sandbox.looked_into):
        for node in source.nodes:
            if isinstance(node, ast.keyword) and node.arg == "ignore_index":
                with contextlib.suppress(ValueError):
                    return int(ast.literal_eval(node.value))
    return None
