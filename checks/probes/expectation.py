"""Dropout replaced by what it gives on average, and masks drawn by hand by masks that are known.

A right dropout gives its own input on average; a mask that only silences gives it where nothing is silenced.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..expect import farthest
from ..watch.calls import recorded
from ..watch.dropout import is_dropout, reads_mode, training_alone

FUSED, WHOLE = "scaled_dot_product_attention", "multi_head_attention_forward"
UNIFORM = ("rand", "rand_like", "uniform_")


class Averaged(TorchFunctionMode):
    """Every dropout of PyTorch gives its input, whatever its rate: a forward in training is then one in evaluation.

    Unless what is kept is scaled once more, or by another rate, behind the call. `calls` counts them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = getattr(func, "__name__", ""), dict(kwargs or {})
        dropped = name in ("dropout", "dropout_")
        if dropped or name == WHOLE or (name == FUSED and (len(args) > 4 or "dropout_p" in given)):
            self.calls += 1
        if dropped:
            return args[0] if args else given["input"]
        if name == WHOLE:
            given["training"] = False
        elif name == FUSED and len(args) > 4:
            args = (*args[:4], 0.0, *args[5:])
        elif name == FUSED:
            given["dropout_p"] = 0.0
        return func(*args, **given)


class Uniform(Averaged):
    """Beside it, numbers drawn uniformly from 0 to 1 are these instead; `largest` counts the most drawn in one call."""

    def __init__(self, seed: int | None = None, *, turned: bool = False, constant: float = 0.0) -> None:
        super().__init__()
        self.seed, self.turned, self.constant, self.largest = seed, turned, constant, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in UNIFORM and isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
            result.copy_(self.numbers(result))
        return result

    def numbers(self, like: Tensor) -> Tensor:
        if self.seed is None:
            return torch.full_like(like, self.constant)
        drawn = torch.empty(like.shape, dtype=torch.float64)
        drawn.uniform_(generator=torch.Generator().manual_seed(self.seed))
        return (1 - drawn if self.turned else drawn).to(like)


def unscaled(model: nn.Module, run: Callable[[], Any], bound: float) -> str | None:
    """The first module that silences entries by a mask drawn uniformly, and leaves what it keeps as it is.

    `run` is a forward; the rates are a half. With every entry kept, its output is then that of evaluation; and masks
    that keep opposite halves give together what all and nothing kept do, since a mask behind the softmax multiplies.
    A mask before the softmax need not be made up for, nor one smaller than what it multiplies (of whole layers, rows).
    """
    for name, module in model.named_modules():
        if reads_mode(module) and not is_dropout(module):
            trial = Trial(model, module, name or type(model).__name__, run)
            if trial.silences(bound):
                return trial.name
    return None


@dataclass
class Trial:
    """One module of a model in training mode by itself."""

    model: nn.Module
    module: nn.Module
    name: str
    run: Callable[[], Any]

    def gives(self, numbers: Uniform | None = None) -> Tensor | None:
        """What the module gives where it draws these; in evaluation mode without."""
        trained = [] if numbers is None else [self.module]
        with training_alone(self.model, *trained), recorded(self.model) as calls, numbers or nullcontext():
            self.run()
        return next((call.outputs[0] for call in calls if call.module == self.name and call.outputs), None)

    def silences(self, bound: float) -> bool:
        high, low = Uniform(constant=1 - 1e-6), Uniform(constant=1e-6)
        kept, none, calm = self.gives(high), self.gives(low), self.gives()
        if kept is None or none is None or calm is None or high.largest < 2 * calm[..., 0].numel():
            return False
        if farthest(none, calm) < farthest(kept, calm):
            kept, none = none, kept
        if not bool(none.isfinite().all()) or farthest(kept, calm) > bound or not farthest(none, calm) > bound:
            return False
        half, other = self.gives(Uniform(seed=3)), self.gives(Uniform(seed=3, turned=True))
        return half is not None and other is not None and farthest(half + other, kept + none) <= 2 * bound
