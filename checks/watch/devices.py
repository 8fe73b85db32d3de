"""Tensors that a forward creates on PyTorch's default device and then combines with tensors of the model.

On a CPU this works. With model and tokens on a GPU, the same line raises an error.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..expect import Where
from .location import TORCH, line_now

MAKERS = {
    "arange", "zeros", "ones", "full", "empty", "eye", "linspace", "logspace", "rand", "randn", "randint", "randperm",
    "tensor", "as_tensor", "from_numpy", "tril_indices", "triu_indices", "hann_window",
}  # fmt: skip
MOVES = {"to", "cuda", "type_as", "new_tensor", "copy_", "__get__"}
ACCEPTS = {
    "__getitem__",
    "__setitem__",
    "index_put_",
    "item",
    "tolist",
    "numpy",
    "__len__",
    "size",
    "allclose",
    "equal",
}


class Homeless(TorchFunctionMode):
    """Follows tensors made without a device. `found` is the first place where one is combined with a model's tensor."""

    def __init__(self, model_tensors: list[Tensor]) -> None:
        super().__init__()
        # what the forward was given, the function that made the tensor, the one that combined it, and where
        self.found: tuple[str, str, str, Where | None] | None = None
        self.given = ""
        self.aware = False  # whether the model names a device for some tensor, or moves one to another's device
        self.kept: list[Tensor] = []  # keeps them alive, so that no id is reused
        self.made: dict[int, str] = {}
        self.theirs = {id(tensor) for tensor in model_tensors}

    def during(self, given: str) -> Homeless:
        """Returns itself, to be entered around a forward with the arguments that `given` describes."""
        self.given = given
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        out = func(*args, **kwargs)
        given = [t for value in (*args, *kwargs.values()) for t in _tensors(value)]
        strays = [self.made[id(t)] for t in given if id(t) in self.made and t.dim() > 0]
        theirs = any(id(t) in self.theirs for t in given)
        self._look_for_care(name, args, kwargs, bool(strays))
        if name in MAKERS and kwargs.get("device") is None and not given:
            self._adopt(out, self.made, name)
        elif strays and theirs and name not in ACCEPTS | MOVES:
            self.found = self.found or (self.given, strays[0], name, line_now())
        elif strays and not theirs and name not in MOVES:
            self._adopt(out, self.made, strays[0])
        if theirs or (name in MOVES and strays):
            self._adopt(out, self.theirs)
        return out

    def _look_for_care(self, name: str, args: Any, kwargs: Any, stray: bool) -> None:
        """Sets `aware` if the model's own code, rather than one of PyTorch's modules, handles devices."""
        if sys._getframe(2).f_code.co_filename.startswith(TORCH):
            return
        moved = name in MOVES and stray and any(isinstance(value, torch.device | Tensor) for value in args[1:])
        self.aware |= moved or (name in MAKERS and kwargs.get("device") is not None)

    def _adopt(self, out: Any, into: dict[int, str] | set[int], name: str = "") -> None:
        for tensor in _tensors(out):
            self.kept.append(tensor)
            if isinstance(into, dict):
                into[id(tensor)] = name
            else:
                into.add(id(tensor))
                self.made.pop(id(tensor), None)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
