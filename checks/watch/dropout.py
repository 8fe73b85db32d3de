"""Dropout sites, which are modules that declare a dropout rate, and which of them never drop anything.

A site is tried by itself: its module in training mode, all other modules in evaluation mode.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..expect import farthest
from .calls import recorded

RATE_NAME = re.compile(r"^p$|drop(out)?(_?(p|prob|rate|ratio|probability))?$|^p_?drop(out)?$|pdrop$", re.I)
NOT_A_SITE = re.compile(r"layer_?drop|drop_?(path|layer|token)|stochastic|head_?drop", re.I)


@dataclass(frozen=True)
class Site:
    """A module that declares a dropout rate, and the name of the attribute that holds the rate."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        return float(getattr(self.module, self.attribute))

    @property
    def functional(self) -> bool:
        """Whether the module is no dropout module but applies dropout itself, among other things."""
        return not is_dropout(self.module)


def sites(model: nn.Module) -> list[Site]:
    """The innermost modules that declare a dropout rate, where it is between 0 and 1."""
    found = [
        Site(name, module, _rates(module)[0])
        for name, module in model.named_modules()
        if _rates(module) and not any(_rates(inner) for inner in module.modules() if inner is not module)
    ]
    return [site for site in found if 0 < site.rate < 1]


def is_dropout(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's dropout modules, or a custom one: a rate, no children, and a class named so."""
    own = "dropout" in type(module).__name__.lower() and not any(module.children())
    return isinstance(module, _DropoutNd) or (own and bool(_rates(module)))


def holds_rate(module: nn.Module) -> bool:
    """Whether the module itself, rather than a module inside it, has a dropout rate as an attribute."""
    return bool(_rates(module))


def _rates(module: nn.Module) -> list[str]:
    if isinstance(module, _DropoutNd):
        return ["p"]
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float) and RATE_NAME.search(name) and not NOT_A_SITE.search(name)
    ]


def set_rates(model: nn.Module, rate: float) -> None:
    """Sets the rate of every site, also of those with rate 0."""
    for module in model.modules():
        for attribute in _rates(module):
            setattr(module, attribute, rate)


@contextmanager
def training_alone(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Puts only these modules in training mode; their children, too, are in evaluation mode."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = False
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def reads_mode(module: nn.Module) -> bool:
    """Whether a module can depend on the mode: its class reads `training`, and it is no dropout module of rate 0."""
    if isinstance(module, _DropoutNd) and module.p == 0:
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    codes = [getattr(value, "__code__", None) for kind in classes for value in vars(kind).values()]
    return any(code is not None and "training" in code.co_names for code in codes)


@dataclass(frozen=True)
class Trial:
    """A model, and `run(tokens, seed)`, which returns its logits and leaves the mode of each module alone."""

    model: nn.Module
    run: Callable[[Tensor, int], Tensor]
    batches: list[Tensor]

    def random(self, modules: tuple[nn.Module, ...], batches: list[Tensor] | None = None) -> bool:
        """Whether the logits are random with only these modules in training mode."""
        with training_alone(self.model, *modules):
            return any(farthest(self.run(t, 1), self.run(t, 2)) > 0 for t in batches or self.batches)

    def changed_by(self, *modules: nn.Module) -> bool:
        """Whether the logits differ from evaluation mode with only these modules in training mode."""
        calm = [self.run(tokens, 1) for tokens in self.batches]
        with training_alone(self.model, *modules):
            return any(farthest(self.run(t, 1), c) > 0 for t, c in zip(self.batches, calm, strict=True))


def silent_sites(trial: Trial, tried: list[Site]) -> list[Site]:
    """Those tried that the forward uses and that drop nothing in training mode, and for which no other module drops."""
    silent = [site for site in tried if not _lives(trial, site)]
    if not silent:
        return []
    trial.model.train()
    with _executed() as codes, recorded(trial.model) as calls:
        for tokens in trial.batches:
            trial.run(tokens, 1)
    trial.model.eval()
    called = {call.module for call in calls}
    silent = [s for s in silent if not _of_another_task(trial.model, s, called, codes)]
    return [site for site in silent if not _done_by_its_owner(trial, site, silent)]


def _lives(trial: Trial, site: Site) -> bool:
    if trial.random((site.module,)):
        return True
    above = _ancestors(trial.model, site.name)  # they may decide for this one: a fast path, a mode passed down
    if trial.random(above, trial.batches[:1]):
        return site.functional  # those above are random by themselves: this site cannot be judged
    return trial.random((site.module, *above))


def _ancestors(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    parts = name.split(".")
    return tuple(model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))


def _of_another_task(model: nn.Module, site: Site, called: set[str], codes: set[CodeType]) -> bool:
    """Whether a forward that computes logits does not use the site at all.

    It may belong to a module with weights that is not called, or to a method that is not. Methods count only for sites
    of the model itself: an uncalled method of an attention module may be a second path that should drop.
    """
    name = site.name if site.functional else _above(site)
    while name and type(model.get_submodule(name)).forward is nn.Module.forward:  # a ModuleList or ModuleDict
        name = name.rpartition(".")[0]
    if name:
        return name not in called and len(list(model.get_submodule(name).parameters())) > 0
    attribute = site.name.rpartition(".")[2]
    others = [code for method, code in _methods(type(model)) if method not in ("__init__", "forward")]
    return any(attribute in code.co_names and code not in codes for code in others)


def _above(site: Site) -> str:
    return site.name.rpartition(".")[0]


def _methods(kind: type) -> Iterator[tuple[str, CodeType]]:
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    for name in {name for each in own for name in vars(each)}:
        code = getattr(inspect.unwrap(getattr(kind, name)), "__code__", None)
        if code is not None:
            yield name, code


@contextmanager
def _executed() -> Iterator[set[CodeType]]:
    """Collects the code objects that run inside."""
    found: set[CodeType] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _done_by_its_owner(trial: Trial, site: Site, silent: list[Site]) -> bool:
    """Whether the site is a dropout module that only holds the rate, while a module around it does the dropping.

    The rate may be passed to scaled_dot_product_attention, for example. One such functional dropout excuses one
    dropout module, the nearest one.
    """
    if site.functional or not site.name:
        return False
    model, above = trial.model, _above(site)
    working = [m for m in _parts_that_may(model, above) if trial.random((m,), trial.batches[:1])]
    modules = [other for other in silent if not other.functional]
    nearer = [other for other in modules if _is_inside(_above(other), above)]
    rivals = [other for other in modules if _above(other) == above]
    return rivals.index(site) < len(working) - len(nearer)


def _is_inside(name: str, above: str) -> bool:
    return name != above and (not above or name.startswith(f"{above}."))


def _parts_that_may(model: nn.Module, above: str) -> list[nn.Module]:
    """Modules inside this one that may do a site's dropping: no sites themselves, and without a rate of their own."""
    with_their_own = {id(site.module) for site in sites(model)}
    return [
        module
        for name, module in model.get_submodule(above).named_modules()
        if reads_mode(module) and id(module) not in with_their_own and not (name.count(".") and holds_rate(module))
    ]
