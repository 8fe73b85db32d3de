"""Which plan and variant a subject that does not agree comes nearest to: in stages, and by how far its numbers agree.

What a family leaves open must be settled before a part is blamed, else the wrong GELU is the first that differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...transformer.model import ModelConfig, Transformer
from .agreement import apart
from .reference import Variant, build, family_config, load, undrawn, vary
from .specimen import Settled
from .trace import Step, checkpoints, depth, steps
from .weights.roles import Plan

# What speaks in a stage, and which output projections are silent. Products of parts become sums, and bugs separate.
STAGES: dict[str, tuple[str, ...]] = {
    "embedding, positions, final norm and head": ("attention", "feed-forward"),
    "feed-forward and its norm": ("attention",),
    "attention and its norm": ("feed-forward",),
}
MOST = 24  # plans and variants that are looked at further
# What a family leaves open, in the order in which a forward pass meets it.
CHOICES: tuple[Callable[[Plan, Variant], Any], ...] = (
    lambda plan, variant: variant.eps,
    lambda plan, variant: (variant.positions, variant.rope_base, variant.mirrored, variant.stretch),
    lambda plan, variant: plan.arrangement,
    lambda plan, variant: variant.tiled,
    lambda plan, variant: plan.gate_first,
    lambda plan, variant: variant.activation,
)
Candidate = tuple[Plan, Variant]


@contextlib.contextmanager
def silenced(plan: Plan, which: tuple[str, ...]) -> Iterator[None]:
    """Inside, the subject's output projections of attention or feed-forward are zero."""
    outputs = {"attention": plan.output, "feed-forward": plan.feed_forward_output}
    places = [place for name in which for place in (outputs[name].at, outputs[name].bias) if place is not None]
    tensors = [layer[place].tensor for layer in plan.inventory.layers for place in places]
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
        try:
            yield
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def traced(found: Settled) -> tuple[Tensor, list[Step]]:
    """Two rows of tokens, and every number that the subject computes of them."""
    seen, tokens = found.specimen, found.specimen.tokens[:2].contiguous()
    return tokens, steps(seen.model, lambda: seen.logits(tokens), tokens.numel())


def explicit(plan: Plan, variant: Variant) -> Transformer:
    """The reference with attention step by step."""
    with undrawn():
        model = Transformer(ModelConfig(**family_config(plan, variant), attention="explicit"))
    return vary(load(model, plan), variant)


class Closeness:
    """How near a candidate is to the subject; each is looked at once, and the subject itself once in all."""

    def __init__(self, found: Settled) -> None:
        self.found = found
        self.known: dict[tuple, dict[str, float]] = {}
        self.depths: dict[tuple, int] = {}
        self.theirs = {}
        for stage, which in STAGES.items():
            with silenced(found.candidates[0][0], which):
                self.theirs[stage] = found.specimen.logits()
        self.tokens, self.steps = traced(found)
        self.logits = found.specimen.logits(self.tokens)

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
            held = [(p, p.clone()) for block in ours.blocks for p in _outputs(block, which)]
            for parameter, _ in held:
                parameter.zero_()
            theirs = self.theirs[stage]
            errors[stage] = apart(theirs, ours(self.found.specimen.tokens)[..., : theirs.shape[-1]].double())
            for parameter, value in held:
                parameter.copy_(value)
        return errors

    def agreeing(self, candidate: Candidate) -> int:
        """In how many stages."""
        bound = self.found.specimen.bound.size
        return sum(error <= bound for error in self.stages(*candidate).values())

    def depth(self, candidate: Candidate) -> int:
        """How many numbers of the reference the subject has before the first that it lacks."""
        key = key_of(*candidate)
        if key not in self.depths:
            self.depths[key] = depth(self.steps, checkpoints(explicit(*candidate), self.tokens), self.logits)
        return self.depths[key]

    def nearest(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those of which the most stages agree; of these, those whose numbers agree longest."""
        most = max(map(self.agreeing, candidates))
        best = [one for one in candidates if self.agreeing(one) == most]
        if len(best) < 2:
            return best
        deepest = max(map(self.depth, best))
        return [one for one in best if self.depth(one) == deepest]


def _outputs(block: Any, which: tuple[str, ...]) -> list[Tensor]:
    parts = {"attention": block.attention.output, "feed-forward": block.feed_forward.output}
    return [p for name in which for p in parts[name].parameters()]


def key_of(plan: Plan, variant: Variant) -> tuple:
    return tuple(choice(plan, variant) for choice in CHOICES)


def nearest(found: Settled) -> list[tuple[Plan, Variant, dict[str, float]]]:
    """The candidates that come nearest, with their disagreement in stages; found once."""
    if found.near is None:
        found.near = promising(found)
    return found.near


def promising(found: Settled) -> list[tuple[Plan, Variant, dict[str, float]]]:
    """The nearest candidates, settled choice by choice: one, or several where what is wrong hides the choice."""
    if not found.candidates:
        return []
    closeness = Closeness(found)
    best = found.candidates[0]
    for _ in range(2):  # the second time with what comes later settled too
        for index in range(len(CHOICES)):
            best = closeness.nearest(_choices(index, best, found.candidates))[0]
    around = [_choices(index, best, found.candidates) for index in range(len(CHOICES))]
    around.sort(key=lambda choices: (len({id(plan) for plan, _ in choices}) > 1, len(choices)))  # plans go by names
    near = closeness.nearest([one for choices in around for one in choices])
    return [(*one, closeness.stages(*one)) for one in {key_of(*one): one for one in (best, *near)}.values()][:MOST]


def _choices(index: int, best: Candidate, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that differ from this one in one choice only, itself among them."""
    return [one for one in candidates if _others(index, one) == _others(index, best)]


def _others(index: int, candidate: Candidate) -> tuple:
    """All its choices but one."""
    key = key_of(*candidate)
    return key[:index] + key[index + 1 :]
