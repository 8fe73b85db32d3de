"""The known bugs on a subject's own weights: the one that gives its numbers exactly is what it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from checks.bugs import Bug, all_bugs
from checks.spec.agreement import apart
from checks.spec.oracle import Variant, build, family_config, load, vary
from checks.spec.roles import Plan
from checks.subject import reference_parts
from transformer.model import Transformer

LIVE = 1e-10  # of the largest logit: a bug that moves less is no bug at these sizes


@dataclass(frozen=True)
class Simulated:
    """A damaged reference with the subject's weights."""

    bug: Bug
    model: nn.Module
    scope: str = ""  # "in every block" where the catalogue damages one


def simulated(plan: Plan, variant: Variant) -> Iterator[Simulated]:
    """Every known bug of a model that these weights can have."""
    for bug in all_bugs().values():
        model = damaged([bug], plan, variant)
        if model is not None:
            yield Simulated(bug, model)
            everywhere = _everywhere(model, bug, plan, variant)
            if everywhere is not None:
                yield Simulated(bug, everywhere, "in every block")


def explanations(
    plan: Plan, variant: Variant, tokens: Tensor, theirs: Tensor, bound: float, until: float
) -> tuple[list[Simulated], bool]:
    """The bugs that give the subject's logits, each of them exactly; and whether all were tried before `until`."""
    found: list[Simulated] = []
    clean = logits(build(plan, variant), tokens)[..., : theirs.shape[-1]]
    for one in simulated(plan, variant):
        if time.monotonic() > until:
            return found, False
        try:
            ours = logits(one.model, tokens)[..., : theirs.shape[-1]]
        except Exception:  # damage that these sizes cannot bear is not what the subject has
            continue
        same = ours.shape == theirs.shape and apart(theirs, ours) <= bound
        if same and apart(ours, clean) > LIVE and all(one.bug is not other.bug for other in found):
            found.append(one)
    return found, True


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).double()


def damaged(bugs: list[Bug], plan: Plan, variant: Variant) -> Transformer | None:
    """The reference built with the damage, then given their weights; None if a bug is not of these models."""
    config = family_config(plan, variant)
    if not all(_applies(bug, config) for bug in bugs):
        return None
    attention = {name: bug.sizes[name] for bug in bugs for name in ("attention",) if name in bug.sizes}
    others = {bug.of for bug in bugs} - {reference_parts}
    if len(others) > 1:
        return None
    parts = (others.pop() if others else reference_parts)(**{**config, **attention})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for bug in bugs:
                whole = parts.build_model
                bug.damage(parts)
                if parts.build_model is whole:
                    return None
            model = parts.build_model(dropout=0.0)
    except Exception:  # a bug of sizes that this subject does not have
        return None
    return vary(load(model, plan), variant) if isinstance(model, Transformer) else None


def _applies(bug: Bug, config: dict[str, Any]) -> bool:
    """Whether the bug's kind of positions, norm and feed-forward is the subject's."""
    return all(bug.sizes.get(name, config[name]) == config[name] for name in ("norm", "feed_forward")) and _kind(
        bug.sizes.get("positions", config["positions"])
    ) == _kind(config["positions"])


def _kind(positions: str) -> str:
    return positions.partition("-")[0]


def _everywhere(model: Transformer, bug: Bug, plan: Plan, variant: Variant) -> Transformer | None:
    """The same damage in every block, where the catalogue has it in some."""
    classes: dict[str, set[type]] = {}
    changed: dict[str, type] = {}
    for block in model.blocks:
        for name, module in block.named_modules():
            kind = type(module)
            classes.setdefault(name, set()).add(kind)
    for name, kinds in classes.items():
        if len(kinds) == 2:
            odd = [kind for kind in kinds if kind.__module__.startswith("checks.bugs")]
            if len(odd) == 1:
                changed[name] = odd[0]
    if not changed:
        return None
    again = damaged([bug], plan, variant)
    assert again is not None
    for block in again.blocks:
        for name, kind in changed.items():
            block.get_submodule(name).__class__ = kind
    return again
