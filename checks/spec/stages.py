"""Where two models part: sublayers silenced in both, so that what still differs lies in what still speaks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from checks.spec.agreement import apart
from checks.spec.oracle import Variant, build, family_config, load, vary
from checks.spec.roles import Plan
from checks.spec.settling import Settled, disagreement, one_thread
from checks.spec.simulation import Catalogue, Simulated, damaged, explanations, fill, logits
from checks.spec.trace import Parting, Step, checkpoints, depth, parting, steps
from transformer.model import ModelConfig, Transformer

# What speaks in a stage, and which output projections are silent. Products of parts become sums, and bugs separate.
STAGES: dict[str, tuple[str, ...]] = {
    "embedding, positions, final norm and head": ("attention", "feed-forward"),
    "feed-forward and its norm": ("attention",),
    "attention and its norm": ("feed-forward",),
}


MOST = 24  # plans and variants that are looked at in stages
LIKELY = 2  # of them that are tried with two bugs before the others are tried with one


@dataclass
class Explained:
    """The known bugs that give the subject's numbers: each of `ties` alone, or all of `together` at once."""

    plan: Plan
    variant: Variant
    ties: list[Simulated] = field(default_factory=list)
    together: list[list[Simulated]] = field(default_factory=list)  # a list of ties for each part
    parts: list[str] = field(default_factory=list)  # stages in which the numbers differ
    complete: bool = True  # False where the time was over before every bug was tried

    @property
    def ids(self) -> list[str]:
        groups = [self.ties] if self.ties else self.together
        return [one.bug.id for group in groups for one in group]


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


def differing(found: Settled, plan: Plan, variant: Variant) -> dict[str, float]:
    """The disagreement in each stage."""
    errors = {}
    for stage, which in STAGES.items():
        with silenced(plan, which):
            errors[stage] = disagreement(found.specimen, plan, variant, found.specimen.logits())
    return errors


def explain(found: Settled, seconds: float) -> Explained | None:
    """Single bugs on full weights first, for the likeliest plans; then a bug for each part, and all of them at once."""
    with one_thread():
        return _explain(found, time.process_time() + seconds)


def _explain(found: Settled, until: float) -> Explained | None:
    bound = found.specimen.bound.size
    ranked = promising(found)
    if not ranked:
        return None
    first = Explained(*ranked[0][:2], parts=_over(ranked[0][2], bound))
    known: list[Catalogue] = []
    for some in (ranked[:LIKELY], ranked[LIKELY:]):
        for plan, variant, errors in some:
            catalogue = Catalogue.of(plan, variant, known)
            ties, complete = explanations(catalogue, plan, found.specimen.tokens, found.theirs, bound, until)
            if ties:
                ties = confirmed(found, plan, variant, ties)
                return Explained(plan, variant, ties=ties, parts=_over(errors, bound), complete=complete)
            first.complete &= complete
        for plan, variant, errors in some[:LIKELY]:
            together = _by_part(found, Catalogue.of(plan, variant, known), plan, errors, until)
            if together:
                return Explained(plan, variant, together=together, parts=_over(errors, bound))
    first.complete &= time.process_time() < until
    return first


def _over(errors: dict[str, float], bound: float) -> list[str]:
    return [stage for stage, error in errors.items() if error > bound]


def promising(found: Settled) -> list[tuple[Plan, Variant, dict[str, float]]]:
    """Plans and variants of which the most stages agree; first those whose numbers it has longest."""
    bound = found.specimen.bound.size
    seen = [(plan, variant, differing(found, plan, variant)) for plan, variant in _few(found)]
    fewest = min((len(_over(errors, bound)) for _, _, errors in seen), default=0)
    best = [each for each in seen if len(_over(each[2], bound)) == fewest]
    if len(best) < 2:
        return best
    tokens, theirs = _traced(found)
    logits = found.specimen.logits(tokens)
    return sorted(best, key=lambda each: -depth(theirs, checkpoints(_explicit(*each[:2]), tokens), logits))


def _traced(found: Settled) -> tuple[Tensor, list[Step]]:
    """Two rows of tokens, and every number that the subject computes of them."""
    tokens = found.specimen.tokens[:2].contiguous()
    return tokens, steps(found.specimen.model, lambda: found.specimen.logits(tokens), tokens.numel())


def _explicit(plan: Plan, variant: Variant) -> Transformer:
    """The reference with attention step by step."""
    with torch.random.fork_rng(devices=[]):
        model = Transformer(ModelConfig(**family_config(plan, variant), attention="explicit"))
    return vary(load(model, plan), variant)


def _few(found: Settled) -> list[tuple[Plan, Variant]]:
    """All variants of the likeliest plans."""
    plans = list(dict.fromkeys(id(plan) for plan, _ in found.candidates))[:6]
    return [(plan, variant) for plan, variant in found.candidates if id(plan) in plans][:MOST]


def confirmed(found: Settled, plan: Plan, variant: Variant, ties: list[Simulated]) -> list[Simulated]:
    """Ties that are none in other calls: with gradients, of one token, of one row; all of them if none is left."""
    seen, left = found.specimen, ties
    for tokens in (seen.tokens, seen.tokens[:, :1].contiguous(), seen.tokens[:1, :5].contiguous()):
        if len(left) < 2:
            break
        with torch.enable_grad(), seen.running():
            theirs = seen.subject.logits(seen.model, tokens).detach().double()
            weights = build(plan, variant).state_dict()
            same = []
            for one in left:
                ours = fill(one.model, weights)(tokens.clone()).detach()[..., : theirs.shape[-1]]
                same += [one] if apart(theirs, ours.double()) <= seen.bound.size else []
        left = same or left
    return left


def _by_part(
    found: Settled, catalogue: Catalogue, plan: Plan, errors: dict[str, float], until: float
) -> list[list[Simulated]]:
    """For each stage that differs, the bugs that explain it; only if together they give the full numbers."""
    seen, bound = found.specimen, found.specimen.bound.size
    groups: list[list[Simulated]] = []
    for stage, which in STAGES.items():
        if errors[stage] <= bound:
            continue
        with silenced(plan, which):
            ties, _ = explanations(catalogue, plan, seen.tokens, seen.logits(), bound, until)
        if not ties:
            return []
        if not any({one.bug.id for one in ties} & {one.bug.id for one in group} for group in groups):
            groups.append(ties)
    if len(groups) < 2:
        return []
    for choice in product(*groups):
        model = damaged([one.bug for one in choice], catalogue.config, catalogue.variant)
        if model is not None and _same(fill(model, build(plan, catalogue.variant).state_dict()), found, bound):
            return groups
    return []


def part_from(found: Settled, plan: Plan, variant: Variant) -> Parting | None:
    """The first part that differs, with the line of the subject."""
    with one_thread():
        tokens, theirs = _traced(found)
        return parting(theirs, checkpoints(_explicit(plan, variant), tokens), found.specimen.logits(tokens))


def _same(model: nn.Module, found: Settled, bound: float) -> bool:
    ours = logits(model, found.specimen.tokens)[..., : found.theirs.shape[-1]]
    return ours.shape == found.theirs.shape and apart(found.theirs, ours) <= bound
