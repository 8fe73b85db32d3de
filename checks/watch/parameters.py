"""What one forward does with the parameters: which are looked up, which multiply activations, which are gains."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calls import Call, recorded

MATRIX = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum")
LOOKUP = ("embedding", "__getitem__", "index_select", "gather")
NORM = ("layer_norm", "rms_norm", "group_norm")
WEIGHT = 2  # a norm's arguments: input, shape or groups, weight


class Operands(TorchFunctionMode):
    """Sees the parameters, and views of them, among the arguments of what is called inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if p.dim()}
        self._uses: dict[str, set[str]] = defaultdict(set)
        self._gains: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, called = kwargs or {}, getattr(func, "__name__", "")
        for place, value in (*enumerate(args), *kwargs.items()):
            for name in map(self._named, value if isinstance(value, list | tuple) else (value,)):
                if name is not None:
                    self._uses[name].add(called)
                    if called in NORM and place in (WEIGHT, "weight"):
                        self._gains.add(name)
        return func(*args, **kwargs)

    def _named(self, value: Any) -> str | None:
        if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter) or value.is_sparse:
            return None
        return self._names.get(value.untyped_storage().data_ptr())

    @property
    def looked_up(self) -> set[str]:
        """Tables of which rows are taken."""
        return {name for name, uses in self._uses.items() if not uses.isdisjoint(LOOKUP)}

    @property
    def multipliers(self) -> set[str]:
        """What activations are multiplied by, and the biases beside it; a tied head is a table first."""
        return {name for name, uses in self._uses.items() if not uses.isdisjoint(MATRIX)} - self.looked_up

    @property
    def gains(self) -> set[str]:
        """What PyTorch's own norms multiply by."""
        return self._gains


def first_inputs(calls: list[Call]) -> dict[str, Tensor]:
    """The tensor that each module read in its first call, of those that read one only."""
    found: dict[str, Tensor] = {}
    for call in calls:
        if len(call.inputs) == 1:
            found.setdefault(call.module, call.inputs[0])
    return found


@torch.no_grad()
def gains_of(model: nn.Module, run: Any) -> set[str]:
    """Vectors that each feature of a module's output is multiplied by: at zero, nothing of the input comes through."""
    with Operands(model) as operands, recorded(model) as calls:
        run()
    found, inputs = set(operands.gains), first_inputs(calls)
    for owner, module in model.named_modules():
        vectors = dict(module.named_parameters(recurse=False))
        if owner in inputs and all(v.dim() == 1 for v in vectors.values()) and not any(module.children()):
            found |= {f"{owner}.{n}" for n, v in vectors.items() if n and _silences(module, v, inputs[owner])}
    return found


def _silences(module: nn.Module, vector: Tensor, x: Tensor) -> bool:
    kept = vector.detach().clone()
    try:
        vector.zero_()
        out = module(x)
    except Exception:  # no function of this tensor alone
        return False
    finally:
        vector.copy_(kept)
    if not isinstance(out, Tensor) or out.shape != x.shape or x.dim() < 2:
        return False
    rows = out.flatten(0, -2)
    return bool((rows == rows[:1]).all())


@torch.no_grad()
def amplification(module: nn.Module, like: Tensor) -> float | None:
    """The size of what a module of one tensor makes of noise of unit size; None if it refuses."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        out = module(noise)
    except Exception:
        return None
    return float(out.double().square().mean().sqrt()) if isinstance(out, Tensor) and out.numel() else None
