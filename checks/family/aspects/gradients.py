"""The gradients of a subject's weights, and the reference's of the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..agreement import apart
from ..reference import build
from ..specimen import Settled
from ..weights.inventory import Weight

SILENT = 1e-12  # of the largest gradient: below this two gradients are both nothing (a key's bias has none)


@dataclass(frozen=True)
class Slope:
    """One tensor of the reference: how far the subject's gradient is from it, and what it is called there."""

    part: str  # blocks.0.attention.qkv.weight
    theirs: str  # the subject's name of it, or of the first of those it is put together from
    error: float  # of the tensor's largest gradient
    ratio: float  # the subject's gradient as a multiple of the reference's, by least squares


def slopes(found: Settled) -> list[Slope]:
    """Of a random combination of the logits, for every weight that both train."""
    assert found.plan is not None and found.variant is not None
    seen = found.specimen
    ours = build(found.plan, found.variant)
    direction = torch.randn(found.theirs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    seen.model.zero_grad(set_to_none=True)
    with torch.enable_grad(), seen.running():
        (seen.subject.logits(seen.model, seen.tokens) * direction).sum().backward()
        (ours(seen.tokens)[..., : found.theirs.shape[-1]] * direction).sum().backward()
    trained = {name: w for name, w in ours.named_parameters() if w.grad is not None}
    theirs = found.plan.state(_gradient)
    largest = max(float(w.grad.abs().max()) for w in trained.values())  # type: ignore[union-attr]
    names = _names(found)
    compared = [_slope(name, names.get(name, name), theirs[name], w.grad, largest)  # type: ignore[arg-type]
                for name, w in trained.items() if name in theirs]  # fmt: skip
    seen.model.zero_grad(set_to_none=True)
    return compared


def _gradient(weight: Weight) -> Tensor | None:
    """None for what is not trained; a trained weight that gets nothing gets zeros."""
    if not weight.tensor.requires_grad:
        return None
    return torch.zeros_like(weight.tensor) if weight.tensor.grad is None else weight.tensor.grad


def _slope(part: str, name: str, theirs: Tensor, ours: Tensor, largest: float) -> Slope:
    if float((theirs - ours).abs().max()) <= SILENT * largest:
        return Slope(part, name, 0.0, 1.0)
    return Slope(part, name, apart(theirs, ours), float((theirs * ours).sum() / ours.square().sum().clamp(min=1e-300)))


def _names(found: Settled) -> dict[str, str]:
    """The subject's names by ours: a number for each of its weights, followed through the mapping."""
    weights, numbers = found.plan.inventory.weights, {}  # type: ignore[union-attr]
    for number, weight in enumerate(weights):
        numbers[id(weight)] = torch.full_like(weight.tensor, float(number))
    mapped = found.plan.state(lambda w: numbers.get(id(w)))  # type: ignore[union-attr]
    return {name: weights[int(tensor.flatten()[0])].name for name, tensor in mapped.items()}
