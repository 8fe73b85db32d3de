"""Where two models part: sublayers silenced in both, so that what still differs lies in what still speaks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ..subject import one_thread
from .agreement import apart
from .blame import Catalogue, Simulated, damaged, explanations, fill, logits
from .closeness import STAGES, explicit, nearest, silenced, traced
from .reference import Variant, build
from .specimen import Settled
from .trace import Parting, checkpoints, parting
from .weights.roles import Plan

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


def explain(found: Settled, seconds: float) -> Explained | None:
    """Single bugs on full weights first, for the likeliest plans; then a bug for each part, and all of them at once."""
    with one_thread():
        return _explain(found, time.process_time() + seconds)


def _explain(found: Settled, until: float) -> Explained | None:
    bound = found.specimen.bound.size
    ranked = nearest(found)
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
            if ties:
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


def confirmed(found: Settled, plan: Plan, variant: Variant, ties: list[Simulated]) -> list[Simulated]:
    """Those that give the subject's numbers in other calls too: with gradients, of one token, of one row.

    Of those left, what the catalogue has so before what is only so in every block.
    """
    weights = build(plan, variant).state_dict()
    for tokens in _other_calls(found):
        theirs = _with_gradients(found, tokens)
        if theirs is not None:
            ties = [one for one in ties if _gives(fill(one.model, weights), tokens, theirs, found.specimen.bound.size)]
    return [one for one in ties if not one.scope] or ties


def _other_calls(found: Settled) -> list[Tensor]:
    tokens = found.specimen.tokens
    return [tokens, tokens[:, :1].contiguous(), tokens[:1, :5].contiguous()]


def _with_gradients(found: Settled, tokens: Tensor) -> Tensor | None:
    """The subject's logits; None where it cannot be called so."""
    seen = found.specimen
    try:
        with torch.enable_grad(), seen.running():
            return seen.subject.logits(seen.model, tokens).detach().double()
    except Exception:  # a single token, or a batch of another size, may be refused
        return None


def _gives(model: nn.Module, tokens: Tensor, theirs: Tensor, bound: float) -> bool:
    with torch.enable_grad():
        ours = model(tokens.clone()).detach()[..., : theirs.shape[-1]]
    return apart(theirs, ours.double()) <= bound


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
            ties = confirmed(found, plan, catalogue.variant, ties)
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
        tokens, theirs = traced(found)
        return parting(theirs, checkpoints(explicit(plan, variant), tokens), found.specimen.logits(tokens))


def _same(model: nn.Module, found: Settled, bound: float) -> bool:
    ours = logits(model, found.specimen.tokens)[..., : found.theirs.shape[-1]]
    return ours.shape == found.theirs.shape and apart(found.theirs, ours) <= bound
