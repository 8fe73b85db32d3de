"""How GPT-2's weights are drawn, against how a subject's are: pooled over seeds and layers, judged by standard errors.

Radford et al. 2019 and the code published with it: normal with deviation 0.02 (0.01 for positions, in the code), what
writes to the residual stream divided by √(2 L), biases zero and gains one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...expect import NotApplicable
from ...watch.draws import seeded
from ..specimen import Settled
from ..weights.inventory import Weight
from ..weights.roles import Norm, Plan

SEEDS = 4
DEVIATION, POSITIONS = 0.02, (0.02, 0.01)
ERRORS = 6.0  # standard errors: a right draw is beyond them once in 5e8
SLACK = 0.015  # of the deviation: a normal cut off at three deviations has 1.3 % less


@dataclass(frozen=True)
class Drawn:
    """All values of one role at initialization, over seeds and layers."""

    role: str
    name: str  # of its first weight
    values: Tensor
    wanted: tuple[float, ...]  # deviations that the rule allows

    @property
    def deviation(self) -> float:
        return float(self.values.std())

    def tolerance(self, wanted: float) -> float:
        return wanted * (ERRORS / (2 * len(self.values)) ** 0.5 + SLACK)

    @property
    def fits(self) -> bool:
        centred = abs(float(self.values.mean())) <= ERRORS * self.deviation / len(self.values) ** 0.5
        return centred and any(abs(self.deviation - w) <= self.tolerance(w) for w in self.wanted)


@dataclass(frozen=True)
class Constant:
    """A vector that starts as one number, as it is found over seeds and layers."""

    role: str  # "bias" or "gain"
    name: str
    values: Tensor
    wanted: float

    @property
    def fits(self) -> bool:
        return bool((self.values == self.wanted).all())


def drawn(found: Settled) -> tuple[list[Drawn], list[Constant]]:
    """Raises NotApplicable where the weights are not drawn anew with every model, or are not found by their names."""
    plan, models = found.plan, _models(found)
    assert plan is not None
    L = len(plan.inventory.layers)
    matrices = [Drawn(role, weights[0].name, _pooled(models, weights), wanted)
                for role, weights, wanted in _roles(plan, L)]  # fmt: skip
    return matrices, [Constant(role, w.name, _pooled(models, [w]), wanted) for role, w, wanted in _constants(plan)]


def _models(found: Settled) -> list[dict[str, Tensor]]:
    seen = found.specimen
    subject, shape = seen.subject, seen.shape
    if not subject.builds_afresh:
        raise NotApplicable("an instance was handed in: its weights may be trained")
    sizes: dict[str, Any] = dict(vocab_size=shape.vocab_size, block_size=shape.block_size, n_head=shape.n_head,
                                 n_embd=shape.n_embd, n_layer=len(seen.inventory.layers))  # fmt: skip
    sizes = {name: value for name, value in sizes.items() if subject.can_vary(name)}
    models = []
    for seed in range(SEEDS):
        with seeded(subject.seed + seed):
            models.append(_values(subject.build(seed=subject.seed + seed, **sizes)))
    if all(torch.equal(models[0][name], models[1][name]) for name in models[0]):
        raise NotApplicable("no weight depends on the seed: they may be trained")
    return models


def _values(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: value.detach().double().clone() for name, value in named}


def _pooled(models: list[dict[str, Tensor]], weights: list[Weight]) -> Tensor:
    missing = [w.name for w in weights if w.name not in models[0]]
    if missing:
        raise NotApplicable(f"{missing[0]} is not among the model's named parameters")
    return torch.cat([model[w.name].flatten() for model in models for w in weights])


def _roles(plan: Plan, L: int) -> Iterator[tuple[str, list[Weight], tuple[float, ...]]]:
    layers = plan.inventory.layers
    yield "token embedding", [plan.embedding], (DEVIATION,)
    if plan.positions is not None and plan.positions.trained:
        yield "position table", [plan.positions], POSITIONS
    for role, matrix in zip(("queries, keys and values",) * 99, plan.attention, strict=False):
        yield role, [layer[matrix.at] for layer in layers], (DEVIATION,)
    for matrix in plan.feed_forward:
        yield "feed-forward input", [layer[matrix.at] for layer in layers], (DEVIATION,)
    for role, matrix in (("attention output", plan.output), ("feed-forward output", plan.feed_forward_output)):
        yield role, [layer[matrix.at] for layer in layers], (DEVIATION / (2 * L) ** 0.5,)
    if not plan.tied:
        yield "head", [plan.head], (DEVIATION,)


def _constants(plan: Plan) -> Iterator[tuple[str, Weight, float]]:
    for layer in plan.inventory.layers:
        for matrix in (*plan.attention, plan.output, *plan.feed_forward, plan.feed_forward_output):
            if matrix.bias is not None:
                yield "bias", layer[matrix.bias], 0.0
        for norm in (plan.attention_norm, plan.feed_forward_norm):
            yield from _norm(norm, layer)
    yield from _norm(plan.final_norm, None)


def _norm(norm: Norm | None, layer: list[Weight] | None) -> Iterator[tuple[str, Weight, float]]:
    if norm is None:
        return
    for role, place, wanted in (("gain", norm.gain, 0.0 if norm.minus_one else 1.0), ("bias", norm.bias, 0.0)):
        weight = layer[place] if layer is not None and isinstance(place, int) else place
        if isinstance(weight, Weight):
            yield role, weight, wanted
