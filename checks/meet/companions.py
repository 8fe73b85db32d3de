"""What a file has beside its model and is no part by a name of its own: evaluation, schedule, average of weights, …

Each is recognised by its kind, from the words of its name and from what it takes. How it is called is found out by
whoever judges it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..expect import Where, shown
from ..generation.met_generate import generates
from ..subject import Companion
from . import vocabulary
from .stubs import Stub
from .which_model import Found

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
GENERATES = vocabulary.words(
    "generate generation sample sampling complete completion decode beam search greedy nucleus"
)
STEPS = vocabulary.words("step steps it iter iteration t i epoch n cur current global num index idx")
LENGTHS = vocabulary.words("step steps iters iterations epochs warmup")


@dataclass(frozen=True)
class Pair:
    """Two functions of a file that are a tokenizer together."""

    encode: Any
    decode: Any


def words_of(name: str) -> frozenset[str]:
    """`CosineLRSchedule`, `cosine_lr_schedule`: cosine, lr, schedule."""
    return frozenset(word.lower() for word in WORD.findall(name))


def companions_in(found: Found, parts: Mapping[str, Any]) -> tuple[Companion, ...]:
    """The companions of the model in the file, as written, without what is used as one of its parts."""
    used = {id(inspect.unwrap(part)) if callable(part) else id(part) for part in parts.values()}
    companions = []
    for name, value in found.scope.items():
        if not _is_own(value, found) or id(inspect.unwrap(value)) in used or name in parts:
            continue
        kind = next((kind for kind, fits in KINDS.items() if fits(words_of(name), value)), None)
        if kind is not None and name.lstrip("_") == name:
            companions.append(Companion(kind, name, value, _where(name, kind, found)))
        if inspect.isclass(value) and issubclass(value, nn.Module):
            companions += _methods(name, value, "generate" in parts)
    pair = [found.scope.get(name) for name in ("encode", "decode")]
    if all(inspect.isfunction(one) and _is_own(one, found) and len(parameters_of(one)) == 1 for one in pair):
        companions.append(Companion("tokenizer", "encode", Pair(*pair), _where("encode", "tokenizer", found)))
    return tuple(sorted(companions, key=lambda one: one.where.line))


def _is_own(value: Any, found: Found) -> bool:
    if not (inspect.isfunction(value) or inspect.isclass(value)) or isinstance(value, Stub):
        return False
    return value.__module__ == found.module.__name__


def _methods(name: str, cls: type[nn.Module], beside: bool) -> list[Companion]:
    """The methods of a module that generate; one called generate is the model's own, unless a function is beside it."""
    return [
        Companion("generation", f"{name}.{key}", method, _line(f"{name}.{key}", method))
        for key, method in vars(cls).items()
        if inspect.isfunction(method) and not key.startswith("_") and (beside or key != "generate")
        if words_of(key) & GENERATES and generates(method, method=True)
    ]


def _line(name: str, method: Any) -> Where:
    code = inspect.unwrap(method).__code__
    return Where(name, "generation", shown(code.co_filename), code.co_firstlineno)


def _where(name: str, kind: str, found: Found) -> Where:
    for source in found.sandbox.sources.values():
        for tree, filename in zip(source.trees, source.filenames, strict=True):
            for node in tree.body:
                named = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
                if isinstance(node, ast.Assign):
                    named = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if name in named:
                    return Where(name, kind, shown(filename), node.lineno)
    return Where(name, kind)


# -- kinds


def parameters_of(value: Any) -> dict[str, inspect.Parameter]:
    """By lower-case name; none where the signature cannot be read."""
    try:
        return {name.lower(): p for name, p in inspect.signature(value).parameters.items()}
    except (TypeError, ValueError):
        return {}


def _has(value: Any, *methods: str) -> bool:
    return inspect.isclass(value) and all(callable(getattr(value, method, None)) for method in methods)


def _is_evaluation(words: frozenset[str], value: Any) -> bool:
    named = words & vocabulary.words("evaluate evaluation eval validate perplexity ppl bpb bpc")
    return inspect.isfunction(value) and bool(named or {"estimate", "loss"} <= words)


def _is_preference_loss(words: frozenset[str], value: Any) -> bool:
    named = words & vocabulary.words("dpo ipo orpo simpo cpo preference")
    takes = frozenset[str]().union(*(words_of(name) for name in parameters_of(value)))
    return inspect.isfunction(value) and bool(named and takes & vocabulary.CHOSEN and takes & vocabulary.REJECTED)


def _is_distillation_loss(words: frozenset[str], value: Any) -> bool:
    named = words & vocabulary.words("distill distil distillation kd kl jsd loss divergence")
    takes = " ".join(parameters_of(value))
    return inspect.isfunction(value) and bool(named) and "teacher" in takes and "student" in takes


def _is_schedule(words: frozenset[str], value: Any) -> bool:
    of_the_rate = "lr" in words or {"learning", "rate"} <= words
    other = words & vocabulary.words("beta momentum wd weight temperature dropout noise mask kl")
    decays = "decay" in words and words & vocabulary.words("cosine linear polynomial exponential sqrt")
    plan = words & vocabulary.words("schedule scheduler sched scheduled warmup noam wsd annealing anneal") or decays
    if not of_the_rate and (other or not plan):
        return False
    if inspect.isclass(value):
        refused = (nn.Module, torch.optim.Optimizer)
        return not issubclass(value, refused) and bool(
            {"step", "get_lr", "__call__", "step_and_update_lr"} & set(dir(value))
        )
    takes = [words_of(name) for name in parameters_of(value)]
    told = frozenset[str]().union(*takes)
    makes = plan and told & vocabulary.words("warmup total training max decay") and told & LENGTHS
    return inspect.isfunction(value) and bool(any(one and one <= STEPS for one in takes) or makes)


def _is_average(words: frozenset[str], value: Any) -> bool:
    named = words & vocabulary.words("ema average averaged averager averaging shadow polyak")
    meters = words & vocabulary.words("meter meters metric loss scalar")
    updates = _has(value, "update") or _has(value, "update_parameters") or _has(value, "copy_to", "forward")
    return bool(named) and not meters and updates


def _is_optimizer(words: frozenset[str], value: Any) -> bool:
    if not inspect.isclass(value):
        return False
    named = (
        words & vocabulary.words("adam adamw sgd lion muon adagrad ada optimizer momentum") or {"rms", "prop"} <= words
    )
    return issubclass(value, torch.optim.Optimizer) or bool(named and _has(value, "step", "zero_grad"))


def _is_tokenizer(words: frozenset[str], value: Any) -> bool:
    return _has(value, "encode", "decode") and not issubclass(value, nn.Module)


def _is_generation(words: frozenset[str], value: Any) -> bool:
    return inspect.isfunction(value) and bool(words & GENERATES) and generates(value, method=False)


KINDS: dict[str, Callable[[frozenset[str], Any], bool]] = {
    "preference loss": _is_preference_loss,
    "distillation loss": _is_distillation_loss,
    "evaluation": _is_evaluation,
    "generation": _is_generation,
    "average": _is_average,
    "schedule": _is_schedule,
    "optimizer": _is_optimizer,
    "tokenizer": _is_tokenizer,
}
