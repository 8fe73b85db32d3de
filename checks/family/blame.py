"""The known bugs on a subject's own weights: the one that gives its numbers exactly is what it has."""

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
from .agreement import apart
from .reference import Variant, build, family_config, undrawn, vary
from .weights.roles import Plan

LIVE = 1e-10  # of the largest logit: a bug that moves less is no bug at these sizes


@dataclass(frozen=True, eq=False)
class Simulated:
    """A damaged reference, to be given a subject's weights."""

    bug: Bug
    model: Transformer
    scope: str = ""  # "in every block" or "in every norm" where the catalogue damages one


@dataclass
class Catalogue:
    """The known bugs of one variant, built once: another plan, or silenced sublayers, only needs other weights."""

    config: dict[str, Any]
    variant: Variant
    models: list[Simulated] = field(default_factory=list)
    whole: bool = False  # all are built
    dead: set[int] = field(default_factory=set)  # models that give what the undamaged reference gives
    idle: set[str] = field(default_factory=set)  # bugs whose models did so in another variant: not built

    @classmethod
    def of(cls, plan: Plan, variant: Variant, known: list[Catalogue]) -> Catalogue:
        """The one of `known` that fits, or a new one, which joins them."""
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
        """As catalogued, and in more places unless it has done nothing so."""
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
    """The bugs that give the subject's logits, each of them exactly; and whether all were tried before `until`.

    The first pass of a catalogue, which must be on full weights, drops what gives the undamaged reference's numbers.
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
        except Exception:  # damage that these sizes cannot bear is not what the subject has
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
    """Some bugs write on what they are given."""
    with torch.no_grad():
        return model(tokens.clone()).double()


def fill(model: Transformer, weights: dict[str, Tensor]) -> Transformer:
    """A sound reference's weights into a damaged one; parts that damage took away stay away."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in weights and tensor.shape == weights[name].shape:
                tensor.copy_(weights[name])
    if "head.bias" in weights:
        model.head.bias = nn.Parameter(weights["head.bias"].clone())
    return model


def damaged(bugs: list[Bug], config: dict[str, Any], variant: Variant) -> Transformer | None:
    """The reference of a variant, built with the damage; None if a bug is not of such models."""
    if not all(_applies(bug, config) for bug in bugs):
        return None
    attention = {name: bug.sizes[name] for bug in bugs for name in ("attention",) if name in bug.sizes}
    others = {bug.of for bug in bugs} - {reference_parts}
    if len(others) > 1:
        return None
    parts = (others.pop() if others else reference_parts)(**{**config, **attention})
    try:
        with undrawn():
            for bug in bugs:
                whole = parts.build_model
                bug.damage(parts)
                if parts.build_model is whole:
                    return None
            model = parts.build_model(dropout=0.0)
    except Exception:  # a bug of sizes that this subject does not have
        return None
    if not isinstance(model, Transformer) or _of_another_kind(model, config):
        return None
    return vary(model, variant).eval()


def _of_another_kind(model: Transformer, config: dict[str, Any]) -> bool:
    """Whether damage that was made for a GPT-2 has put its feed-forward where a gated one was."""
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
    """The same damage in every block, or in every norm, where the catalogue has it in some."""
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
    """A part's name without the number of its block; None outside."""
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
