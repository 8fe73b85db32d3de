"""How far the subject's logits are from the reference's, and which plan and variant come nearest if none agrees.

The variant must be known before a part is blamed: otherwise the other form of GELU is the first part that differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...transformer.model import ModelConfig, Transformer
from .reference import Variant, build, family_config, load, uninitialized, vary
from .specimen import Fit, Specimen
from .trace import Step, checkpoints, depth, steps
from .weights.roles import Plan

# The parts that act in a stage, and the sublayers whose output projections are set to zero. This separates two bugs
# in different parts, and tells where a bug is.
STAGES: dict[str, tuple[str, ...]] = {
    "embedding, positions, final norm and head": ("attention", "feed-forward"),
    "feed-forward and its norm": ("attention",),
    "attention and its norm": ("feed-forward",),
}
MOST = 24  # candidates that `nearest` returns
# What a family leaves open, in the order of a forward pass.
CHOICES: tuple[Callable[[Plan, Variant], Hashable], ...] = (
    lambda plan, variant: variant.eps,
    lambda plan, variant: (variant.positions, variant.rope_base, variant.mirrored, variant.rope_scaling),
    lambda plan, variant: plan.arrangement,
    lambda plan, variant: variant.tiled,
    lambda plan, variant: plan.gate_first,
    lambda plan, variant: variant.activation,
)
Candidate = tuple[Plan, Variant]
Key = tuple[Hashable, ...]  # the choices of a candidate


def apart(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference, relative to our largest number; infinite where only one side is finite."""
    theirs, ours = theirs.detach(), ours.detach()
    if theirs.shape != ours.shape:
        return float("inf")
    same = (theirs == ours) | (theirs.isnan() & ours.isnan())
    difference = torch.where(same, 0.0, (theirs - ours).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
    largest = ours[ours.isfinite()].abs().max() if bool(ours.isfinite().any()) else torch.tensor(1.0)
    return float(difference.max() / largest.clamp(min=1e-300))


def disagreement(specimen: Specimen, plan: Plan, variant: Variant, theirs: Tensor) -> float:
    """The largest difference of the logits, relative to the largest logit."""
    with torch.no_grad():
        ours = build(plan, variant)(specimen.tokens)[..., : theirs.shape[-1]]
    return apart(theirs, ours.double())


@contextlib.contextmanager
def silenced(plan: Plan, which: tuple[str, ...]) -> Iterator[None]:
    """Inside, the subject's output projections of attention, feed-forward or both are zero."""
    outputs = {"attention": plan.output, "feed-forward": plan.feed_forward_output}
    places = [place for name in which for place in (outputs[name].at, outputs[name].bias) if place is not None]
    with scaled([layer[place].tensor for layer in plan.inventory.layers for place in places], 0.0):
        yield


@contextlib.contextmanager
def scaled(tensors: list[Tensor], factor: float) -> Iterator[None]:
    """Inside, these tensors are multiplied by a factor, in place."""
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.mul_(factor) if factor else tensor.zero_()
        try:
            yield
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def traced(fit: Fit) -> tuple[Tensor, list[Step]]:
    """Two rows of tokens, and every tensor that the subject computes from them."""
    specimen, tokens = fit.specimen, fit.specimen.tokens[:2].contiguous()
    return tokens, steps(specimen.model, lambda: specimen.logits(tokens), tokens.numel())


def explicit(plan: Plan, variant: Variant) -> Transformer:
    """The reference, with attention computed step by step rather than by a fused kernel."""
    with uninitialized():
        model = Transformer(ModelConfig(**family_config(plan, variant), attention="explicit"))
    return vary(load(model, plan), variant)


class Closeness:
    """How near each candidate is to the subject. The subject is run once, and each candidate once."""

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.known: dict[Key, dict[str, float]] = {}
        self.depths: dict[Key, int] = {}
        self.theirs: dict[str, Tensor] = {}
        for stage, which in STAGES.items():
            with silenced(fit.candidates[0][0], which):
                self.theirs[stage] = fit.specimen.logits()
        self.tokens, self.steps = traced(fit)
        self.logits = fit.specimen.logits(self.tokens)

    def stages(self, plan: Plan, variant: Variant) -> dict[str, float]:
        """The disagreement in each stage."""
        key = key_of(plan, variant)
        if key not in self.known:
            self.known[key] = self._stages(build(plan, variant))
        return self.known[key]

    @torch.no_grad()
    def _stages(self, ours: Transformer) -> dict[str, float]:
        errors = {}
        for stage, which in STAGES.items():
            theirs = self.theirs[stage]
            with scaled([p for block in ours.blocks for p in _outputs(block, which)], 0.0):
                errors[stage] = apart(theirs, ours(self.fit.specimen.tokens)[..., : theirs.shape[-1]].double())
        return errors

    def agreeing(self, candidate: Candidate) -> int:
        """The number of stages in which the candidate agrees."""
        bound = self.fit.specimen.bound.size
        return sum(error <= bound for error in self.stages(*candidate).values())

    def depth(self, candidate: Candidate) -> int:
        """How many tensors of the reference the subject computes before the first that it does not compute."""
        key = key_of(*candidate)
        if key not in self.depths:
            self.depths[key] = depth(self.steps, checkpoints(explicit(*candidate), self.tokens), self.logits)
        return self.depths[key]

    def nearest(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that agree in the most stages; among these, those that agree longest in a forward pass."""
        most = max(map(self.agreeing, candidates))
        best = [one for one in candidates if self.agreeing(one) == most]
        if len(best) < 2:
            return best
        deepest = max(map(self.depth, best))
        return [one for one in best if self.depth(one) == deepest]


def _outputs(block: Any, which: tuple[str, ...]) -> list[Tensor]:
    parts = {"attention": block.attention.output, "feed-forward": block.feed_forward.output}
    return [p for name in which for p in parts[name].parameters()]


def key_of(plan: Plan, variant: Variant) -> Key:
    return tuple(choice(plan, variant) for choice in CHOICES)


def nearest(fit: Fit) -> list[tuple[Plan, Variant, dict[str, float]]]:
    """The candidates that come nearest, each with its disagreement in every stage; found once.

    They are chosen choice by choice. Several are left where the fault hides which choice is right.
    """
    if fit.near is None:
        fit.near = _nearest(fit)
    return fit.near


def _nearest(fit: Fit) -> list[tuple[Plan, Variant, dict[str, float]]]:
    if not fit.candidates:
        return []
    closeness = Closeness(fit)
    best = fit.candidates[0]
    for _ in range(2):  # the second time, later choices are right too
        for index in range(len(CHOICES)):
            best = closeness.nearest(_alternatives(index, best, fit.candidates))[0]
    around = [_alternatives(index, best, fit.candidates) for index in range(len(CHOICES))]
    around.sort(key=lambda some: (len({id(plan) for plan, _ in some}) > 1, len(some)))  # plans are ranked by names
    near = closeness.nearest([one for some in around for one in some])
    return [(*one, closeness.stages(*one)) for one in {key_of(*one): one for one in (best, *near)}.values()][:MOST]


def _alternatives(index: int, best: Candidate, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that differ from this one in one choice only, and itself."""
    return [one for one in candidates if _others(index, one) == _others(index, best)]


def _others(index: int, candidate: Candidate) -> Key:
    """All its choices but one."""
    key = key_of(*candidate)
    return key[:index] + key[index + 1 :]
