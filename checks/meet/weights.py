"""Weights from a file (`--checkpoint`): the state_dict in it, the sizes it was saved with, and loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import vocabulary
from .errors import UsageError

STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "weights", "net", "module", "params")
PREFIXES = ("_orig_mod.", "module.", "model.")
SHOWN = 4  # names of tensors in an error


def read(file: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The state_dict in a file, and the sizes that were saved with it or follow from its shapes."""
    if not Path(file).is_file():
        raise UsageError(f"--checkpoint {file}: no such file")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UsageError(
            f"--checkpoint {file} cannot be read as weights ({type(error).__name__}: {first}); "
            "save it with torch.save(model.state_dict(), file)"
        ) from None
    state = _state(saved)
    if state is None:
        kind = (
            f"a dict of {', '.join(map(str, list(saved)[:6]))}" if isinstance(saved, Mapping) else type(saved).__name__
        )
        raise UsageError(f"--checkpoint {file} holds no state_dict: it is {kind}")
    return state, {**_sizes_of_shapes(state), **_saved_sizes(saved)}


def _state(saved: Any) -> dict[str, Tensor] | None:
    if not isinstance(saved, Mapping):
        return None
    if saved and all(isinstance(value, Tensor) for value in saved.values()):
        return dict(saved)
    return next((state for key in STATE_KEYS if (state := _state(saved.get(key))) is not None), None)


def _saved_sizes(saved: Mapping[str, Any]) -> dict[str, int]:
    """Integers named like sizes in the configuration that was saved with the weights."""
    found: dict[str, int] = {}
    for value in [saved, *saved.values()]:
        for name, number in value.items() if isinstance(value, Mapping) else ():
            size = vocabulary.size_of(str(name))
            if size and size != "dropout" and isinstance(number, int) and not isinstance(number, bool):
                found.setdefault(size, number)
    return found


def _sizes_of_shapes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes from shapes: vocabulary and width from the token table, block size from that of positions, layers."""
    tables = {name: x for name, x in state.items() if x.dim() == 2 and re.search("emb|wte|tok", name.lower())}
    found: dict[str, int] = {}
    positions = next(
        (x for n, x in tables.items() if re.search("pos|wpe", n.lower())), state.get("transformer.wpe.weight")
    )
    tokens = next((x for name, x in tables.items() if x is not positions), None)
    if tokens is not None:
        found["vocab_size"], found["n_embd"] = tokens.shape
    if positions is not None:
        found["block_size"] = positions.shape[0]
    layers = [int(n) for name in state for n in re.findall(r"(?:^|\.)(\d+)\.", name)[:1]]
    return {**found, "n_layer": max(layers) + 1} if layers else found


def sizes_beside(model: nn.Module, state: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of saved weights, by comparing their shapes with those of a model built in known sizes.

    If an axis of the model has the length of one size, the same axis in the file has the length of that size there.
    """
    mine, found = model.state_dict(), dict[str, set[int]]()
    for name, x in _fitting(state, mine).items():
        there = mine.get(name)
        if isinstance(there, Tensor) and there.dim() == x.dim():
            for here, saved in zip(there.shape, x.shape, strict=True):
                for size in ("vocab_size", "block_size", "n_embd"):
                    if sizes[size] == here:
                        found.setdefault(size, set()).add(saved)
    return {size: lengths.pop() for size, lengths in found.items() if len(lengths) == 1}


def load_into(model: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    """Loads the weights. Raises UsageError that names the tensors that are missing, unknown or of another shape."""
    mine = model.state_dict()
    state = _fitting(state, mine)
    missing = [name for name in mine if name not in state]
    unknown = [name for name in state if name not in mine]
    shapes = [f"{n} {list(x.shape)}, in the model {list(mine[n].shape)}" for n, x in state.items()
              if n in mine and isinstance(mine[n], Tensor) and mine[n].shape != x.shape]  # fmt: skip
    tied = [
        name
        for name in missing
        if any(mine[name] is mine[o] or _shares(mine[name], mine[o]) for o in state if o in mine)
    ]
    kinds = {"not in the file": [name for name in missing if name not in tied], "not in the model": unknown}
    problems = [_listed(says, found) for says, found in {**kinds, "of another shape": shapes}.items() if found]
    if problems:
        raise UsageError(f"--checkpoint {file} does not fit the model\n  " + "\n  ".join(problems))
    model.load_state_dict(state, strict=False)


def _listed(says: str, found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{says}: {', '.join(found[:SHOWN])}{more}"


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _fitting(state: Mapping[str, Tensor], mine: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state under the model's names for its tensors, as far as they match."""
    return next((s for s in _renamed(state) if set(s) & set(mine)), dict(state))


def _renamed(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The state as it is, and without the prefixes that compiling and data parallelism add."""
    found = [dict(state)]
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in found[-1]):
            found.append({name.removeprefix(prefix): x for name, x in found[-1].items()})
    return found
