"""The formulas of next-token losses, in float64: what a loss should be, by its reduction, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # from a mask [B, T] to the weight of each place
    "mean": lambda m: m.double() / m.sum().clamp(min=1),
    "sum": lambda m: m.double(),
    "the sum over rows of each row's mean": lambda m: m.double() / m.sum(1, keepdim=True).clamp(min=1),
    "the mean over rows of each row's mean": lambda m: m.double() / m.sum(1, keepdim=True).clamp(min=1) / len(m),
    "the mean over rows of each row's sum": lambda m: m.double() / len(m),
    "the sum over the unmasked, divided by all positions": lambda m: m.double() / m.numel(),
}
USUAL = tuple(REDUCTIONS)[:5]


def named_reduction(weight: Tensor, mask: Tensor, tolerance: float = 1e-3) -> str:
    """The reduction that explains the weights of the places that `mask` keeps; empty if none of these does."""
    for name, weights in REDUCTIONS.items():
        if torch.allclose(weight[mask], weights(mask)[mask], rtol=tolerance, atol=0):
            return name
    return ""


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, T] of -Σ q log softmax in float64, from the formula alone; q has 1 - smoothing at the target."""
    x = logits.double()
    top = x.amax(-1, keepdim=True)
    log_p = x - top - (x - top).exp().sum(-1, keepdim=True).log()
    own = -log_p.gather(-1, targets[..., None]).squeeze(-1)
    if not smoothing:
        return own
    return (1 - smoothing) * own + smoothing / (x.shape[-1] - 1) * (-log_p.sum(-1) - own)


def expected_gradient(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """[B, T, V] of w (softmax - q), from the formula alone."""
    V = logits.shape[-1]
    own = F.one_hot(targets, V).double()
    q = (1 - smoothing) * own + smoothing / (V - 1) * (1 - own)
    return weights.double()[..., None] * (logits.double().softmax(-1) - q)
