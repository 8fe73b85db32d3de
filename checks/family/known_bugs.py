"""Known bugs, simulated: damaged references with the subject's weights, and which of them give its logits exactly."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.model import GeluFeedForward, Transformer
from .. import bugs
from ..bugs import Bug, all_bugs
from ..reference import reference_parts
from .closeness import apart
from .reference import Variant, build, family_config, uninitialized, vary
from .weights.roles import Plan

LIVE = 1e-10  # of the largest logit: a bug that changes less has no effect at these sizes


@dataclass(frozen=True, eq=False)
class Simulated:
    """A reference with a known bug, whose weights are still to be filled in."""

    bug: Bug
    model: Transformer
    scope: str = ""  # "in every block" or "in every norm" where the bug itself damages only one


@dataclass
class Catalogue:
    """The known bugs in one variant, each built once: other plans and stages only need other weights."""

    config: dict[str, Any]
    variant: Variant
    models: list[Simulated] = field(default_factory=list)
    whole: bool = False  # all are built
    dead: set[int] = field(default_factory=set)  # ids of models that give the same logits as the undamaged reference
    idle: set[str] = field(default_factory=set)  # bugs for which this was so in another variant: not built

    @classmethod
    def of(cls, plan: Plan, variant: Variant, known: list[Catalogue]) -> Catalogue:
        """The catalogue among `known` of this variant; else a new one, which is added to `known`."""
        config = family_config(plan, variant)
        for catalogue in known:
            if catalogue.config == config and catalogue.variant == variant:
                return catalogue
        idle = {bug for catalogue in known for bug in catalogue.idle | catalogue.without_effect()}
        known.append(cls(config, variant, idle=idle))
        return known[-1]

    def without_effect(self) -> set[str]:
        moving = {one.bug.id for one in self.models if id(one) not in self.dead}
        return {one.bug.id for one in self.models} - moving

    def __iter__(self) -> Iterator[Simulated]:
        yield from self.models
        if self.whole:
            return
        built = {id(one.bug) for one in self.models}
        for bug in all_bugs().values():
            if id(bug) not in built and bug.id not in self.idle:
                yield from self._build(bug)
        self.whole = True

    def _build(self, bug: Bug) -> Iterator[Simulated]:
        """The bug as it is, then in more places, unless it had no effect as it is."""
        model = damaged([bug], self.config, self.variant)
        if model is None:
            return
        first = Simulated(bug, model)
        self.models.append(first)
        yield first
        if id(first) not in self.dead:
            for wider in _spread(model, bug, self.config, self.variant):
                self.models.append(wider)
                yield wider


def explanations(
    catalogue: Catalogue, plan: Plan, tokens: Tensor, theirs: Tensor, bound: float, until: float
) -> tuple[list[Simulated], bool]:
    """The bugs each of which gives the subject's logits exactly; and whether all were tried before `until`.

    The first call for a catalogue, which must be with full weights, sorts out bugs that have no effect.
    """
    found: list[Simulated] = []
    sound = build(plan, catalogue.variant)
    clean, weights = logits(sound, tokens), sound.state_dict()
    for one in catalogue:
        if time.process_time() > until:
            return found, False
        if id(one) in catalogue.dead:
            continue
        try:
            ours = logits(fill(one.model, weights), tokens)
        except Exception:  # a bug that crashes at these sizes is not the subject's
            ours = clean
        if apart(ours, clean) <= LIVE:
            if not catalogue.whole:
                catalogue.dead.add(id(one))
        elif (
            bool(ours.isfinite().any())
            and apart(theirs, ours[..., : theirs.shape[-1]]) <= bound
            and all(one.bug is not o.bug for o in found)
        ):
            found.append(one)
    return found, True


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """In float64. Of a copy of the tokens, since some bugs modify their input."""
    with torch.no_grad():
        result: Tensor = model(tokens.clone())
    return result.double()


def fill(model: Transformer, weights: dict[str, Tensor]) -> Transformer:
    """Copies an undamaged reference's weights into a damaged one. Parts that the damage removed stay removed."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in weights and tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])
    if "head.bias" in weights:
        model.head.bias = nn.Parameter(weights["head.bias"].clone())
    return model


def damaged(bugs: list[Bug], config: dict[str, Any], variant: Variant) -> Transformer | None:
    """The reference of a variant with these bugs; None if one of them does not apply to such a model."""
    if not all(_applies(bug, config) for bug in bugs):
        return None
    attention = {name: bug.sizes[name] for bug in bugs for name in ("attention",) if name in bug.sizes}
    others = {bug.of for bug in bugs} - {reference_parts}
    if len(others) > 1:
        return None
    parts = (others.pop() if others else reference_parts)(**{**config, **attention})
    try:
        with uninitialized():
            for bug in bugs:
                whole = parts.build_model
                bug.damage(parts)
                if parts.build_model is whole:
                    return None
            model = parts.build_model(dropout=0.0)
    except Exception:  # a bug that needs other sizes than this subject has
        return None
    if not isinstance(model, Transformer) or _of_another_kind(model, config):
        return None
    return vary(model, variant).eval()


def _of_another_kind(model: Transformer, config: dict[str, Any]) -> bool:
    """Whether a bug written for GPT-2 has replaced a gated feed-forward by GPT-2's."""
    gated = config["feed_forward"] == "swiglu"
    return gated and any(isinstance(module, GeluFeedForward) for module in model.modules())


def _applies(bug: Bug, config: dict[str, Any]) -> bool:
    """Whether the bug's kind of positions, norm and feed-forward is the subject's."""
    return all(bug.sizes.get(name, config[name]) == config[name] for name in ("norm", "feed_forward")) and _kind(
        bug.sizes.get("positions", config["positions"])
    ) == _kind(config["positions"])


def _kind(positions: str) -> str:
    return positions.partition("-")[0]


def _spread(model: Transformer, bug: Bug, config: dict[str, Any], variant: Variant) -> Iterator[Simulated]:
    """The same bug in every block, or in every norm, if it damages only some."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    damage = {name: kind for name, kind in kinds.items() if _is_damaged(kind)}
    done = [damage.keys()]
    for scope, alike in (("in every block", _in_block), ("in every norm", _norm_class)):
        new = {alike(name, kind): kind for name, kind in damage.items()}
        new.pop(None, None)
        wider = {name: new[alike(name, kind)] for name, kind in kinds.items() if alike(name, kind) in new}
        if wider and all(wider.keys() != names for names in done):
            done.append(wider.keys())
            yield Simulated(bug, _again(bug, config, variant, wider), scope)


def _is_damaged(kind: type) -> bool:
    return any(base.__module__.startswith(bugs.__name__) for base in kind.__mro__)


def _in_block(name: str, kind: type) -> str | None:
    """A part's name without the number of its block; None outside the blocks."""
    starred, inside = re.subn(r"^blocks\.\d+", "blocks.*", name)
    return starred if inside else None


def _norm_class(name: str, kind: type) -> str | None:
    return next((norm.__name__ for norm in (nn.LayerNorm, nn.RMSNorm) if issubclass(kind, norm)), None)


def _again(bug: Bug, config: dict[str, Any], variant: Variant, classes: dict[str, type]) -> Transformer:
    model = damaged([bug], config, variant)
    assert model is not None
    for name, kind in classes.items():
        model.get_submodule(name).__class__ = kind
    return model
