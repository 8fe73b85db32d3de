"""Dropout replaced by its average, and masks drawn by hand replaced by known ones.

On average a correct dropout returns its input. A mask that drops without rescaling returns it only if nothing is
dropped.
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
from ..subject import Subject
from ..watch.calls import recorded
from ..watch.draws import seeded
from ..watch.dropout import Site, is_dropout, reads_mode, training_alone

FUSED, WHOLE = "scaled_dot_product_attention", "multi_head_attention_forward"
UNIFORM = ("rand", "rand_like", "uniform_")
ROWS, CALLS = 3, 256  # of ones through a dropout


@dataclass(frozen=True)
class Means:
    """Of ones that went through a dropout module."""

    trained: float
    evaluated: float
    error: float  # the standard error of the mean in training


def means_through(subject: Subject, model: nn.Module, site: Site) -> Means | None:
    """The means that a dropout module gives in training and in evaluation; None if it is no plain mask."""
    ones = torch.ones(ROWS, 8, subject.sizes.n_embd, device=subject.device)
    with training_alone(model, site.module), seeded(subject.seed), torch.no_grad():
        answers = torch.stack([site.module(ones) for _ in range(CALLS)])
        evaluated = site.module.eval()(ones)
    if torch.unique(answers).numel() > 2 or torch.unique(evaluated).numel() > 1:
        return None
    means = answers.flatten(1).double().mean(dim=1)
    return Means(float(means.mean()), float(evaluated.flatten()[0]), float(means.std()) / CALLS**0.5)


class Averaged(TorchFunctionMode):
    """Every dropout of PyTorch returns its input, whatever its rate, so that training computes what evaluation does.

    Unless the code rescales once more, or by another rate, after the call. `calls` counts the dropouts.
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
    """Also replaces numbers drawn uniformly from 0 to 1 by known ones; `largest` is the most drawn in one call."""

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
    """The first module that drops entries by a mask drawn uniformly and does not rescale those it keeps.

    `run` is a forward; the rates are one half. With every entry kept, the module's output is that of evaluation. And
    masks that keep opposite halves add up to what keeping all and keeping none do, since the mask multiplies. Not so a
    mask before the softmax, which needs no rescaling; nor does one smaller than its operand (of whole layers, rows).
    """
    for name, module in model.named_modules():
        if reads_mode(module) and not is_dropout(module):
            trial = Trial(model, module, name or type(model).__name__, run)
            if trial.silences(bound):
                return trial.name
    return None


@dataclass
class Trial:
    """One module of a model, the only one in training mode."""

    model: nn.Module
    module: nn.Module
    name: str
    run: Callable[[], Any]

    def gives(self, numbers: Uniform | None = None) -> Tensor | None:
        """The module's output when it draws these numbers; without any, its output in evaluation mode."""
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
