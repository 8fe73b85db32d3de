"""How one forward uses the parameters: as lookup tables, as factors of activations, as gains of norms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calls import Call, recorded
from .operations import MATRICES

LOOKUP = ("embedding", "__getitem__", "index_select", "gather")
NORM = ("layer_norm", "rms_norm", "group_norm")
WEIGHT = 2  # a norm's arguments: input, shape or groups, weight


class Operands(TorchFunctionMode):
    """Records which of PyTorch's functions are called with which parameters, or with views of them."""

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
        """Parameters whose rows are looked up."""
        return {name for name, uses in self._uses.items() if not uses.isdisjoint(LOOKUP)}

    @property
    def multipliers(self) -> set[str]:
        """Parameters that multiply activations, and their biases. A tied head counts as a table."""
        return {name for name, uses in self._uses.items() if not uses.isdisjoint(MATRICES)} - self.looked_up

    @property
    def gains(self) -> set[str]:
        """Parameters that PyTorch's own norms multiply by."""
        return self._gains


def first_inputs(calls: list[Call]) -> dict[str, Tensor]:
    """The input of each module in its first call, for modules with a single input tensor."""
    found: dict[str, Tensor] = {}
    for call in calls:
        if len(call.inputs) == 1:
            found.setdefault(call.module, call.inputs[0])
    return found


@torch.no_grad()
def gains_of(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Vectors that multiply every feature of a module's output: set to zero, they make the output constant."""
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
    except Exception:  # not a function of this tensor alone
        return False
    finally:
        vector.copy_(kept)
    if not isinstance(out, Tensor) or out.shape != x.shape or x.dim() < 2:
        return False
    rows = out.flatten(0, -2)
    return bool((rows == rows[:1]).all())


def amplifications(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, float]:
    """By matrix: the size of the output that its module gives for noise of unit size. `run` returns the logits.

    Only modules whose one matrix is this one. A matrix without a gradient is left out, since its output has no effect
    yet: the first matrix of a low-rank adaptation may be large, because the second starts at zero.
    """
    with Operands(model) as operands, recorded(model) as calls:
        logits = run()
    inputs, multipliers = first_inputs(calls), operands.multipliers
    found: dict[str, float] = {}
    for name, gradient in _gradients(model, logits).items():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        alone = [id(p) for p in module.parameters() if p.dim() > 1] == [id(model.get_parameter(name))]
        if name in multipliers and alone and owner in inputs and bool(gradient.any()):
            size = _amplification(module, inputs[owner])
            if size is not None:
                found[name] = size
    return found


def _gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not logits.requires_grad:
        return {}
    found = torch.autograd.grad(logits.double().square().sum(), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


@torch.no_grad()
def _amplification(module: nn.Module, like: Tensor) -> float | None:
    """None if the module refuses a single tensor."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        out = module(noise)
    except Exception:
        return None
    return float(out.double().square().mean().sqrt()) if isinstance(out, Tensor) and out.numel() else None
