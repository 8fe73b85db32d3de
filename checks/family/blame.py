"""Why the logits differ: the known bugs that explain them exactly, and the first part that differs.

Two bugs in different parts are separated in stages: with some sublayers set to zero in subject and reference.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ..subject import one_thread
from .closeness import STAGES, apart, explicit, nearest, silenced, traced
from .known_bugs import Catalogue, Simulated, damaged, explanations, fill, logits
from .reference import Variant, build
from .specimen import Fit
from .trace import FirstDifference, checkpoints, first_difference
from .weights.roles import Plan

LIKELY = 2  # of the nearest candidates: tried with two bugs before the others are tried with one


@dataclass
class Explained:
    """The known bugs that give the subject's logits: each of `ties` alone, or one of each group in `together`."""

    plan: Plan
    variant: Variant
    ties: list[Simulated] = field(default_factory=list)
    together: list[list[Simulated]] = field(default_factory=list)  # a group of ties for each part
    parts: list[str] = field(default_factory=list)  # stages in which the logits differ
    complete: bool = True  # False if time ran out before every bug was tried

    @property
    def ids(self) -> list[str]:
        groups = [self.ties] if self.ties else self.together
        return [one.bug.id for group in groups for one in group]


def explain(fit: Fit, seconds: float) -> Explained | None:
    """Tries single bugs with full weights, for the nearest candidates first; then one bug per part, all at once."""
    with one_thread():
        return _explain(fit, time.process_time() + seconds)


def _explain(fit: Fit, until: float) -> Explained | None:
    bound = fit.specimen.bound.size
    ranked = nearest(fit)
    if not ranked:
        return None
    first = Explained(*ranked[0][:2], parts=_over(ranked[0][2], bound))
    known: list[Catalogue] = []
    for some in (ranked[:LIKELY], ranked[LIKELY:]):
        for plan, variant, errors in some:
            catalogue = Catalogue.of(plan, variant, known)
            ties, complete = explanations(catalogue, plan, fit.specimen.tokens, fit.theirs, bound, until)
            if ties:
                ties = confirmed(fit, plan, variant, ties)
            if ties:
                return Explained(plan, variant, ties=ties, parts=_over(errors, bound), complete=complete)
            first.complete &= complete
        for plan, variant, errors in some[:LIKELY]:
            together = _by_part(fit, Catalogue.of(plan, variant, known), plan, errors, until)
            if together:
                return Explained(plan, variant, together=together, parts=_over(errors, bound))
    first.complete &= time.process_time() < until
    return first


def _over(errors: dict[str, float], bound: float) -> list[str]:
    return [stage for stage, error in errors.items() if error > bound]


def confirmed(fit: Fit, plan: Plan, variant: Variant, ties: list[Simulated]) -> list[Simulated]:
    """The bugs that give the subject's logits in other calls too: with gradients, of one token, of one row.

    If any bug explains them as it is, those that explain them only in every block are left out.
    """
    weights = build(plan, variant).state_dict()
    for tokens in _other_calls(fit):
        theirs = _with_gradients(fit, tokens)
        if theirs is not None:
            ties = [one for one in ties if _gives(fill(one.model, weights), tokens, theirs, fit.specimen.bound.size)]
    return [one for one in ties if not one.scope] or ties


def _other_calls(fit: Fit) -> list[Tensor]:
    tokens = fit.specimen.tokens
    return [tokens, tokens[:, :1].contiguous(), tokens[:1, :5].contiguous()]


def _with_gradients(fit: Fit, tokens: Tensor) -> Tensor | None:
    """The subject's logits; None where it refuses the call."""
    specimen = fit.specimen
    try:
        with torch.enable_grad(), specimen.running():
            return specimen.subject.logits(specimen.model, tokens).detach().double()
    except Exception:  # a single token, or a batch of another size, may be refused
        return None


def _gives(model: nn.Module, tokens: Tensor, theirs: Tensor, bound: float) -> bool:
    with torch.enable_grad():
        ours = model(tokens.clone()).detach()[..., : theirs.shape[-1]]
    return apart(theirs, ours.double()) <= bound


def _by_part(
    fit: Fit, catalogue: Catalogue, plan: Plan, errors: dict[str, float], until: float
) -> list[list[Simulated]]:
    """For each stage that differs, the bugs that explain it; empty unless together they give the full logits."""
    specimen, bound = fit.specimen, fit.specimen.bound.size
    groups: list[list[Simulated]] = []
    for stage, which in STAGES.items():
        if errors[stage] <= bound:
            continue
        with silenced(plan, which):
            ties, _ = explanations(catalogue, plan, specimen.tokens, specimen.logits(), bound, until)
            ties = confirmed(fit, plan, catalogue.variant, ties)
        if not ties:
            return []
        if not any({one.bug.id for one in ties} & {one.bug.id for one in group} for group in groups):
            groups.append(ties)
    if len(groups) < 2:
        return []
    for choice in product(*groups):
        model = damaged([one.bug for one in choice], catalogue.config, catalogue.variant)
        if model is not None and _same(fill(model, build(plan, catalogue.variant).state_dict()), fit, bound):
            return groups
    return []


def first_part_that_differs(fit: Fit, plan: Plan, variant: Variant) -> FirstDifference | None:
    """With the line of the subject's code that computes it."""
    with one_thread():
        tokens, theirs = traced(fit)
        return first_difference(theirs, checkpoints(explicit(plan, variant), tokens), fit.specimen.logits(tokens))


def _same(model: nn.Module, fit: Fit, bound: float) -> bool:
    ours = logits(model, fit.specimen.tokens)[..., : fit.theirs.shape[-1]]
    return ours.shape == fit.theirs.shape and apart(fit.theirs, ours) <= bound
