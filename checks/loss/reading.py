"""What a loss does at each position of the logits, read from its gradient.

At one position the gradient of a cross entropy is w (softmax - q): w is the weight of the position, q the distribution
that it is trained on. Two draws of logits give both, so the shift, the mask, the reduction and label smoothing are
measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # logits [B, T, V], labels [B, T], mask [B, T] to a scalar

NOTHING = 1e-5  # a weight below this fraction of the largest counts as 0: a loss may compute in float32
EXACT, ROUGH = 1e-4, 0.1  # error of the gradient's form allowed in float32, and in bfloat16


class NoGradient(TypeError):
    """The loss returns nothing with a gradient: it was detached or converted to a number."""


@dataclass(frozen=True)
class Reading:
    """What a loss does at each position [B, T], with labels as it takes them."""

    weight: Tensor  # [B, T], of each position in the loss
    source: Tensor  # [B, T], flat index of the label that the position is trained on; -1 where its weight is 0
    smoothing: float  # the probability of q outside that label
    even: bool  # whether it is spread evenly over the other token ids
    error: float  # of the gradient against the form of a cross entropy, relative to the largest weight

    @property
    def used(self) -> Tensor:
        """[B, T], whether the position has any weight."""
        return self.weight > max(NOTHING, self.error) * self.weight.max().clamp(min=1e-300)

    @property
    def offsets(self) -> Tensor:
        """Position of the label minus position of the logits, where used."""
        return (self.source - torch.arange(self.source.numel()).view_as(self.source))[self.used]

    @property
    def crossings(self) -> list[tuple[int, int]]:
        """(row, position) of logits that are trained on the label of another row."""
        rows = torch.arange(len(self.source))[:, None]
        found = self.used & (self.source // self.source.shape[1] != rows)
        return [(int(b), int(t)) for b, t in found.nonzero()]


def counts(weight: Tensor) -> Tensor:
    return weight > NOTHING * weight.max().clamp(min=1e-300)


def read(loss: Loss, symbols: Tensor, V: int, *, rows: int = 2, places: int = 7, mask: Tensor | None = None) -> Reading:
    """Reads a loss over V token ids, using `symbols` as labels: as digits, they spell out the index of their position.

    Raises NoGradient when the loss has no gradient, and whatever the loss raises.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, rows, places, V, generator=generator, dtype=torch.float64)
    place = torch.arange(rows * places).view(rows, places)
    base, power, source, readings = len(symbols), 1, torch.zeros_like(place), []
    digit_of = torch.zeros(V, dtype=torch.int64)
    digit_of[symbols] = torch.arange(base)
    while power == 1 or power < place.numel():
        readings.append(read_labels(loss, logits, symbols[place // power % base], mask))
        source += digit_of[readings[-1].source] * power
        power *= base
    weight = readings[0].weight
    source = source.masked_fill(~counts(weight), -1)
    smoothing, error = max(r.smoothing for r in readings), max(r.error for r in readings)
    return Reading(weight, source, smoothing, all(r.even for r in readings), error)


def symbols_that_count(loss: Loss, V: int, places: int, candidates: Tensor) -> Tensor:
    """The token ids that carry loss as labels: a loss may take one for padding."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, places, V, generator=generator, dtype=torch.float64)
    found = [gradient(loss, logits, torch.full((2, places), int(s)), None) for s in candidates]
    return candidates[[bool(g.isfinite().all() and g.any()) for g in found]]


def read_labels(loss: Loss, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Reading:
    """One reading for one set of labels; its source is the token id trained on."""
    one, two = gradient(loss, logits[0], labels, mask), gradient(loss, logits[1], labels, mask)
    p, p2 = logits[0].softmax(-1), logits[1].softmax(-1)
    # gradient = a p - w q, where a cross entropy has a = w and q does not depend on the logits
    a = ((one - two) * (p - p2)).sum(-1) / (p - p2).square().sum(-1)
    wq = a[..., None] * p - one
    weight = wq.sum(-1)
    scale = weight.abs().max().clamp(min=1e-300)
    uneven = (one - two - a[..., None] * (p - p2)).abs().max()
    error = float(torch.stack((uneven, (a - weight).abs().max(), -wq.min())).max() / scale)
    weight = weight.clamp(min=0)
    used = counts(weight)
    q = wq / weight.clamp(min=1e-300)[..., None]
    smoothing = float((1 - q.max(-1).values)[used].max()) if used.any() else 0.0
    return Reading(weight, wq.argmax(-1), smoothing, evenly_spread(q[used]), error if weight.max() > 0 else torch.inf)


def evenly_spread(q: Tensor) -> bool:
    others = q.sort(-1).values[..., :-1]
    return others.numel() == 0 or bool((others - others.mean(-1, keepdim=True)).abs().max() < 1e-3)


def gradient(loss: Loss, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels.clone(), None if mask is None else mask.clone())
    if not value.requires_grad:
        raise NoGradient("it was detached or converted to a number, so it has no gradient")
    (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found
