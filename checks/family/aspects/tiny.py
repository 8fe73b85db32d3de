"""Tiny embeddings: a norm's epsilon then rules what comes out, its value and its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..fit import disagreement, norm_form
from ..norms import USUAL_EPS
from ..reference import norms_of
from ..specimen import Settled
from ..stages import STAGES, silenced
from ..weights.inventory import Weight
from ..weights.roles import Plan

FACTORS = (1e-2, 1e-3, 1e-4, 1e-6)  # deviations of what enters the first norm: around √1e-5, √1e-6, √1e-8, √1e-12
# What a stage shows where the stream is tiny: the norm that reads it first.
NORMS = {
    "embedding, positions, final norm and head": ("the final norm", "norm"),
    "feed-forward and its norm": ("the norm before the feed-forward", "feed_forward_norm"),
    "attention and its norm": ("the norm before attention", "attention_norm"),
}


@dataclass(frozen=True)
class Tiny:
    factor: float
    norm: str
    module: str  # the subject's name of it
    error: float


def parting_scale(found: Settled) -> Tiny | None:
    """The largest factor of the embeddings at which the subject leaves the reference; None if at none."""
    plan, variant, seen = found.plan, found.variant, found.specimen
    assert plan is not None and variant is not None
    for factor in FACTORS:
        for stage, which in STAGES.items():
            with scaled(plan, factor), silenced(plan, which):
                error = disagreement(seen, plan, variant, seen.logits())
            if error > seen.bound.size:
                norm, name = NORMS[stage]
                return Tiny(factor, norm, _module(plan, name), error)
    return None


@contextlib.contextmanager
def scaled(plan: Plan, factor: float) -> Iterator[None]:
    """Inside, the subject's embedding and positions are multiplied by a factor; a tied head with them."""
    tables = [w.tensor for w in (plan.embedding, plan.positions) if w is not None]
    before = [tensor.detach().clone() for tensor in tables]
    with torch.no_grad():
        for tensor in tables:
            tensor.mul_(factor)
        try:
            yield
        finally:
            for tensor, value in zip(tables, before, strict=True):
                tensor.copy_(value)


def odd_epsilon(found: Settled) -> tuple[str, str, float] | None:
    """The first norm with an epsilon that no one chooses: the norm, the subject's name of it, and its epsilon.

    A family leaves open which power of ten it is, none at all, or a floating-point type's own.
    """
    plan = found.plan
    assert plan is not None
    for norm, name in NORMS.values():
        form = norm_form(found.specimen, plan, name)
        if form is not None and form.inside and form.eps not in (0.0, *USUAL_EPS):
            return norm, _module(plan, name), form.eps
    return None


def _module(plan: Plan, name: str) -> str:
    norm = norms_of(plan)[name]
    if norm is None:
        return ""
    gain = norm.gain if isinstance(norm.gain, Weight) else plan.inventory.layers[0][norm.gain]
    return gain.name.rpartition(".")[0]
