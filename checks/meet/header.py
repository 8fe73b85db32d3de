"""The header line of a run: how the model is built and called, what it has, and what was assumed."""

from __future__ import annotations

import ast
import contextlib
from typing import TYPE_CHECKING

import torch

from . import vocabulary
from .roles import named_otherwise
from .sandbox import Sandbox

if TYPE_CHECKING:
    from .loaded import Loaded

SHOWN = 6  # names of what no check calls
ASSIGNABLE = (bool, int, float, str, torch.dtype, type(None))


def header_of(loaded: Loaded) -> str:
    """`model.py:GPT · GPTConfig(vocab_size, …) · forward(idx) → logits · generate ✓ · cache ✗ · assumed: …`."""
    ignored = ignored_index(loaded.sandbox)
    facts = [
        loaded.shown,
        loaded.constructor,
        f"{loaded.forward.call.says} → {loaded.forward.returns}",
        *([f"ignore_index {ignored}"] if ignored is not None else []),
        f"generate {'✓' if _generates(loaded) else '✗'}",
        f"cache ✓ ({loaded.protocol.says})" if loaded.protocol else "cache ✗",
        *([f"padding mask: {loaded.mask_forms[0]}"] if loaded.mask_forms else []),
        *_found(loaded),
        *_batches(loaded),
        *([f"returns {loaded.returns}"] if loaded.returns != "logits" else []),
    ]
    restored = [f"{name} was changed by your code and restored" for name in loaded.sandbox.changed]
    read = [*loaded.forward.assumed, *loaded.assumed, *_targets(loaded)]
    assumed = [*_values(loaded), *loaded.sandbox.remarks, *read, *restored]
    return " · ".join(facts + ([f"assumed: {'; '.join(assumed)}"] if assumed else []))


def _found(loaded: Loaded) -> list[str]:
    """`also found: loss, get_lr (schedule)` and `not checked: LoRALinear.merge, beam_search`."""
    parts = [name for name in sorted(loaded.parts) if name not in ("companions", "batches")]
    found = parts + [f"{one.name} ({one.kind})" for one in loaded.parts.get("companions", ())]
    left = list(loaded.uncalled())
    left = left[:SHOWN] + ([f"{len(left) - SHOWN} more that no check calls"] if left[SHOWN:] else [])
    return [f"{title}: {', '.join(names)}" for title, names in (("also found", found), ("not checked", left)) if names]


def _values(loaded: Loaded) -> list[str]:
    """What the constructor was given beside the sizes."""
    given = loaded.recipe.assumed if loaded.recipe is not None else {}
    told = [f"{name}={value!r}" for name, value in given.items() if isinstance(value, ASSIGNABLE)]
    padding = [n for n in given if vocabulary.squash(n) in vocabulary.PADDING]
    unused = [f"{padding[0]} is an id that no check uses"] if padding else []
    places = loaded.recipe.places if loaded.recipe is not None else {}
    as_there = [f"{name} is taken from {places[name]}" for name in given if name in places]
    return ([", ".join(told[:8]) + ", …" * (len(told) > 8)] if told else []) + unused + as_there


def _batches(loaded: Loaded) -> list[str]:
    """What makes batches, and by how much its targets are shifted."""
    batches = loaded.parts.get("batches", list)()
    return [f"{b.maker}: targets shifted by {b.shift}" for b in batches if b.shift is not None]


def _targets(loaded: Loaded) -> list[str]:
    """Targets under a name that says nothing."""
    if loaded.targets is None or not named_otherwise(loaded.targets):
        return []
    return [f"{loaded.targets.name} takes the targets: it changes the loss and no logit"]


def _generates(loaded: Loaded) -> bool:
    return "generate" in loaded.parts or loaded.has_generate


def ignored_index(sandbox: Sandbox) -> int | None:
    """The `ignore_index=` that the user's code passes to a loss."""
    for source in (source for name, source in sandbox.sources.items() if name not in sandbox.looked_into):
        for node in source.nodes:
            if isinstance(node, ast.keyword) and node.arg == "ignore_index":
                with contextlib.suppress(ValueError):
                    return int(ast.literal_eval(node.value))
    return None
