"""Checkpoints: saved whole or not at all, loaded without running any code that they may hold.

One file holds the model's weights, its ModelConfig and tokenizer as plain dicts, and the state of the trainer.
"""

from __future__ import annotations

import os
import pickle
import warnings
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .suggestion import did_you_mean

if TYPE_CHECKING:
    from .data import CharacterTokenizer
    from .model import Transformer


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe, or of another model; or it could not be written."""


def save(path: str | Path, **state: Any) -> None:
    """Writes tensors and plain values to `path`; whatever stops it midway, the file that was there before remains.

    Raises CheckpointError when the file cannot be written (folder missing or read-only, disk full).
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial, state)
        os.replace(partial, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch wraps an OSError of the file in a RuntimeError
        raise CheckpointError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write(path: Path, state: dict[str, Any]) -> None:
    """To the disk, not only to the system's memory: the name must not point to it before its bytes are safe."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: BaseException) -> str:
    """The system's own words where there are any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)


def load(path: str | Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises CheckpointError if it is missing, damaged, or a pickle with code in it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused in a moment
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason(error)}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: no checkpoint, or one with code. {first_line(error)}") from error
    except Exception as error:  # a reader led through the wrong bytes may stumble over anything
        raise CheckpointError(f"{path} is truncated or no checkpoint: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(state).__name__}")
    return state


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_model(path: str | Path) -> tuple[Transformer, CharacterTokenizer]:
    """The model of a checkpoint, in eval mode, and its tokenizer."""
    from .data import CharacterTokenizer
    from .model import ModelConfig, Transformer

    state = load(path)
    for key in ("model", "config", "tokenizer"):
        if state.get(key) is None:
            raise CheckpointError(f"{path} holds no {key}: its weights can be loaded into a model by load_weights")
    model = Transformer(from_fields(ModelConfig, state["config"]))
    load_weights(model, state["model"])
    return model.eval(), CharacterTokenizer.from_dict(state["tokenizer"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies the weights into the model; CheckpointError, and nothing changed, unless every name and shape fits."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown to the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the model's has {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError("the weights do not fit the model: " + "; ".join(problems[:5]) + more)
    model.load_state_dict(weights)


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from a dict. Raises ValueError for a field it does not have, naming the nearest it has."""
    known = [field.name for field in fields(cls)]
    for name in values:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")
    return cls(**values)
