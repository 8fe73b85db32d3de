"""The first part that differs: every tensor that the subject computes is looked up among those of the reference.

Tensors are compared by sums over their entries, which do not depend on the layout: heads before or after time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...transformer.model import Transformer
from ..expect import Where, shown
from ..watch.location import OURS, TORCH
from .weights.inventory import QUESTIONS

SAME = 1e-8  # relative difference of the sums, in float64
# What a correct model need not compute as a tensor of its own: a fused kernel has no scores.
OPTIONAL = {"queries", "keys", "values", "rotated queries", "rotated keys", "attention scores", "attention weights",
            "feed-forward input", "activation", "token embedding"}  # fmt: skip


@dataclass
class Step:
    """One result of a function that the model calls."""

    function: str
    sums: Tensor
    where: Where


@dataclass(frozen=True)
class Checkpoint:
    """A tensor of the reference, by what it is: "attention scores of block 0"."""

    part: str
    block: int | None
    sums: Tensor

    def __str__(self) -> str:
        return self.part if self.block is None else f"{self.part} of block {self.block}"


@dataclass(frozen=True)
class FirstDifference:
    """The last tensor that agrees, the first part that differs, and the line that computes it."""

    agrees: str
    differs: str
    where: Where | None
    function: str  # called on that line
    ratio: float | None = None  # where the subject's tensor is a multiple of the reference's

    def __str__(self) -> str:
        multiple = f" ({self.ratio:.4g} times the reference's)" if self.ratio is not None else ""
        line = f", at {self.where}" if self.where else ""
        what = f"the first difference is in the {self.differs}"
        return f"everything agrees up to the {self.agrees}; {what}{multiple}{line}"


def sums(x: Tensor) -> Tensor:
    """The number of finite entries, and sums over them that no reordering changes."""
    flat = x.detach().double().flatten()
    flat = flat[flat.isfinite()]
    return torch.stack([torch.tensor(float(len(flat))), flat.sum(), flat.abs().sum(), flat.square().sum(),
                        (flat**3).sum(), flat.abs().sqrt().sum()]).cpu()  # fmt: skip


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same sums."""
    return bool(a[0] == b[0]) and bool(((a - b).abs() <= SAME * sizes(b)).all())


def sizes(sums: Tensor) -> Tensor:
    """[..., 6], what each sum is compared with: signed sums may cancel, so it is a sum of absolute values."""
    count, _, absolute, squares, _, roots = sums.unbind(-1)
    cubes = squares.clamp(min=1e-300) ** 1.5
    return torch.stack([count, absolute, absolute, squares, cubes, roots], -1).clamp(min=1e-300)


class Steps(TorchFunctionMode):
    """Records every floating-point result of the subject, and the line that computed it."""

    def __init__(self, model: nn.Module, smallest: int) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.smallest = smallest
        self.found: list[Step] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in QUESTIONS:
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() >= self.smallest:
                    self.found.append(Step(name, sums(tensor), self.place()))
        return result

    def place(self) -> Where:
        """The innermost running line outside torch and the checks, and its module. Bugs count as a subject's code."""
        frame: FrameType | None = sys._getframe(2)
        bugs = os.path.join(OURS, "bugs")
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith((TORCH, "<")) and (file.startswith(bugs) or not file.startswith(OURS)):
                owner = frame.f_locals.get("self")
                name = self.names.get(id(owner)) or frame.f_code.co_name
                kind = type(owner).__name__ if owner is not None else "function"
                return Where(name, kind, shown(file), frame.f_lineno)
            frame = frame.f_back
        return Where("")


def steps(model: nn.Module, run: Callable[[], Any], smallest: int) -> list[Step]:
    """Every result with at least `smallest` entries. The pieces of a model that reads tokens piecewise are joined."""
    starts: list[int] = []
    seen = Steps(model, smallest)
    hook = model.register_forward_pre_hook(lambda *_: starts.append(len(seen.found)))
    with torch.no_grad():
        run()
        seen.smallest, pieces = smallest // max(len(starts), 1), len(starts)
        starts.clear()
        with seen:
            run()
    hook.remove()
    return folded(seen.found, starts) if pieces > 1 else seen.found


def folded(found: list[Step], starts: list[int]) -> list[Step]:
    """Joins the same step of every piece, by adding its sums; unchanged if the pieces take different steps."""
    length = starts[1] - starts[0]
    parts = [found[start : start + length] for start in starts]
    if len({tuple(step.function for step in part) for part in parts}) > 1:
        return found
    return [replace(same[-1], sums=torch.stack([step.sums for step in same]).sum(0))
            for same in zip(*parts, strict=True)]  # fmt: skip


def checkpoints(model: Transformer, tokens: Tensor) -> list[Checkpoint]:
    """What the reference computes, in order. The reference must compute attention step by step."""
    found: list[Checkpoint] = []
    with torch.no_grad(), _watched(model, found):
        model(tokens)
    return found


@contextmanager
def _watched(model: Transformer, found: list[Checkpoint]) -> Iterator[None]:
    wrapped: list[tuple[Any, str]] = []

    def watch(owner: Any, method: str, *parts: str, block: int | None = None) -> None:
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            found.extend(Checkpoint(part, block, sums(t)) for part, t in zip(parts, results, strict=True))
            return result

        owner.__dict__[method] = outer
        wrapped.append((owner, method))

    watch(model, "embed", "token embedding")
    watch(model.positions, "add", "embedded tokens and positions")
    for index, block in enumerate(model.blocks):
        one: Any = block
        watch(one.attention_norm, "forward", "norm before attention", block=index)
        watch(one.attention, "split_heads", "queries", "keys", "values", block=index)
        watch(one.attention, "place", "rotated queries", "rotated keys", block=index)
        watch(one.attention, "scores", "attention scores", block=index)
        watch(one.attention, "weights", "attention weights", block=index)
        watch(one.attention, "merge_heads", "merged heads", block=index)
        watch(one.attention, "forward", "attention output", block=index)
        watch(one.feed_forward_norm, "forward", "norm before the feed-forward", block=index)
        watch(one.feed_forward.input, "forward", "feed-forward input", block=index)
        watch(one.feed_forward, "activation", "activation", block=index)
        watch(one.feed_forward, "forward", "feed-forward output", block=index)
        watch(one, "residual", "residual stream", block=index)
    watch(model.norm, "forward", "final norm")
    watch(model, "forward", "logits")
    try:
        yield
    finally:
        for owner, method in wrapped:
            del owner.__dict__[method]


def matched(seen: list[Step], wanted: list[Checkpoint], logits: Tensor) -> dict[int, int]:
    """By the index of a tensor of the reference, the first step that gave it. The logits must be those returned."""
    a, b = torch.stack([step.sums for step in seen]), torch.stack([c.sums for c in wanted])
    near = ((a[:, None] - b).abs() <= SAME * sizes(b)).all(dim=-1) & (a[:, None, 0] == b[:, 0])
    found = {index: int(steps.nonzero()[0]) for index, steps in enumerate(near.T) if bool(steps.any())}
    if not alike(sums(logits), wanted[-1].sums):
        found.pop(len(wanted) - 1, None)
    return found


def required(wanted: list[Checkpoint]) -> list[int]:
    return [index for index, c in enumerate(wanted) if c.part not in OPTIONAL]


def depth(seen: list[Step], wanted: list[Checkpoint], logits: Tensor) -> int:
    """How many tensors of the reference the model computes before the first required one that it does not."""
    found = matched(seen, wanted, logits)
    lacking = next((index for index in required(wanted) if index not in found), len(wanted))
    return sum(index < lacking for index in found)


def first_difference(seen: list[Step], wanted: list[Checkpoint], logits: Tensor) -> FirstDifference | None:
    """Where the steps first differ from the reference; None where every required tensor is found.

    None too where no result has the size of the embedded tokens: the model reads its tokens in some other way.
    """
    if all(step.sums[0] != wanted[0].sums[0] for step in seen):
        return None
    first_seen, musts = matched(seen, wanted, logits), required(wanted)
    agreed = max((index for index in musts if index in first_seen), default=-1)
    missing = [index for index in musts if index > agreed]
    if not missing:
        return None
    between = range(agreed + 1, missing[0] + 1)
    last = max((index for index in (agreed, *between) if index in first_seen), default=None)
    first = next(index for index in between if index not in first_seen and (last is None or index > last))
    step = _next(seen, wanted, -1 if last is None else first_seen[last], wanted[first])
    if step is not None and step.function == "scaled_dot_product_attention":
        first = missing[0]
    named = str(wanted[first])
    if step is not None and step.function == "scaled_dot_product_attention":
        named = named.replace("merged heads", "attention scores, mask or softmax")
    agrees = "tokens" if last is None else str(wanted[last])
    return FirstDifference(agrees, named, step.where if step else None, step.function if step else "",
                   _ratio(step, wanted[first]) if step else None)  # fmt: skip


def _next(seen: list[Step], wanted: list[Checkpoint], after: int, like: Checkpoint) -> Step | None:
    """The first step after this index with a result that is new: not in the reference, and not computed before.

    Preferably one with as many entries as the part, or a fused attention.
    """
    known = [c.sums for c in wanted] + [step.sums for step in seen[: after + 1]]
    new = [step for step in seen[after + 1 :] if not any(alike(step.sums, k) for k in known)]
    fits = [step for step in new if step.sums[0] == like.sums[0] or step.function == "scaled_dot_product_attention"]
    return next(iter(fits or new), None)


def _ratio(step: Step, wanted: Checkpoint) -> float | None:
    """The factor, if the step's result is a multiple of the reference's."""
    if step.sums[0] != wanted.sums[0] or not float(wanted.sums[3]) > 0:
        return None
    factor = float((step.sums[3] / wanted.sums[3]).sqrt())
    powers = torch.tensor([1.0, factor, factor, factor**2, factor**3, factor**0.5], dtype=torch.float64)
    scaled = wanted.sums * powers
    powers[0] = 1.0
    return factor if alike(step.sums, torch.cat((wanted.sums[:1], scaled[1:]))) else None
