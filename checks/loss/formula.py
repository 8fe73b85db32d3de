"""The closed forms of a next-token loss in float64: cross entropy, its gradient, and the reductions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # from a mask [B, T] to the weight of each position
    "mean": lambda m: m.double() / m.sum().clamp(min=1),
    "sum": lambda m: m.double(),
    "the sum over rows of each row's mean": lambda m: m.double() / m.sum(1, keepdim=True).clamp(min=1),
    "the mean over rows of each row's mean": lambda m: m.double() / m.sum(1, keepdim=True).clamp(min=1) / len(m),
    "the mean over rows of each row's sum": lambda m: m.double() / len(m),
    "the sum over the unmasked, divided by all positions": lambda m: m.double() / m.numel(),
}
USUAL = tuple(REDUCTIONS)[:5]


def named_reduction(weight: Tensor, mask: Tensor, tolerance: float = 1e-3) -> str:
    """The reduction that gives these weights at the positions that `mask` keeps; empty if none does."""
    for name, weights in REDUCTIONS.items():
        if torch.allclose(weight[mask], weights(mask)[mask], rtol=tolerance, atol=0):
            return name
    return ""


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, T] of -Σ q log softmax, written out in float64; q is 1 - smoothing at the target."""
    x = logits.double()
    top = x.amax(-1, keepdim=True)
    log_p = x - top - (x - top).exp().sum(-1, keepdim=True).log()
    own = -log_p.gather(-1, targets[..., None]).squeeze(-1)
    if not smoothing:
        return own
    return (1 - smoothing) * own + smoothing / (x.shape[-1] - 1) * (-log_p.sum(-1) - own)


def expected_gradient(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, T, V] of w (softmax - q), written out in float64."""
    V = logits.shape[-1]
    own = F.one_hot(targets, V).double()
    q = (1 - smoothing) * own + smoothing / (V - 1) * (1 - own)
    return weights.double()[..., None] * (logits.double().softmax(-1) - q)
