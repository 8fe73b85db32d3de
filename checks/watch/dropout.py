"""Dropout that is declared and never happens: sites that leave the logits as they are, and what excuses some."""

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
    """A module that declares a dropout rate, under the name of the attribute that holds it."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def rate(self) -> float:
        return float(getattr(self.module, self.attribute))

    @property
    def functional(self) -> bool:
        """Whether the module holds a rate for a dropout that it applies itself, among other things."""
        return not is_dropout(self.module)


def sites(model: nn.Module) -> list[Site]:
    """Dropout modules with a rate above 0, and modules that hold such a rate and contain none that does."""
    found = [
        Site(name, module, _rates(module)[0])
        for name, module in model.named_modules()
        if _rates(module) and not any(_rates(inner) for inner in module.modules() if inner is not module)
    ]
    return [site for site in found if 0 < site.rate < 1]


def is_dropout(module: nn.Module) -> bool:
    """PyTorch's dropouts, and people's own: a module without children whose class says so."""
    own = "dropout" in type(module).__name__.lower() and not any(module.children())
    return isinstance(module, _DropoutNd) or (own and bool(_rates(module)))


def holds_rate(module: nn.Module) -> bool:
    """Whether the module itself, not a part of it, has a dropout rate among its attributes."""
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
    """Gives every declared site, also one of rate 0, this rate."""
    for module in model.modules():
        for attribute in _rates(module):
            setattr(module, attribute, rate)


@contextmanager
def training_alone(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Only these modules, not even their children, in training mode."""
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
    """Whether the mode can matter to a module: code of its class reads `training`, and no rate of 0 silences it."""
    if isinstance(module, _DropoutNd) and module.p == 0:
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    codes = [getattr(value, "__code__", None) for kind in classes for value in vars(kind).values()]
    return any(code is not None and "training" in code.co_names for code in codes)


@dataclass(frozen=True)
class Trial:
    """A model, and `run(tokens, seed)`, which gives its logits in whatever mode its parts are."""

    model: nn.Module
    run: Callable[[Tensor, int], Tensor]
    batches: list[Tensor]

    def random(self, modules: tuple[nn.Module, ...], batches: list[Tensor] | None = None) -> bool:
        """Whether the logits are random with only these modules in training mode."""
        with training_alone(self.model, *modules):
            return any(farthest(self.run(t, 1), self.run(t, 2)) > 0 for t in batches or self.batches)

    def changed_by(self, *modules: nn.Module) -> bool:
        """Whether the logits are others with only these modules in training mode."""
        calm = [self.run(tokens, 1) for tokens in self.batches]
        with training_alone(self.model, *modules):
            return any(farthest(self.run(t, 1), c) > 0 for t, c in zip(self.batches, calm, strict=True))


def silent_sites(trial: Trial) -> list[Site]:
    """Sites in whose training nothing is dropped, although the forward reaches them and no other drops for them."""
    silent = [site for site in sites(trial.model) if not _lives(trial, site)]
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
    above = _ancestors(trial.model, site.name)  # some decide for what they contain: a fast path, a mode handed down
    if trial.random(above, trial.batches[:1]):
        return site.functional  # they are random by themselves: nothing can be said of this one
    return trial.random((site.module, *above))


def _ancestors(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    parts = name.split(".")
    return tuple(model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))


def _of_another_task(model: nn.Module, site: Site, called: set[str], codes: set[CodeType]) -> bool:
    """Whether the site belongs to what a forward for logits leaves aside: a part with weights that is not called, or
    a method of the model's own that is not (one of an attention may be a second path that drops)."""
    name = site.name if site.functional else _above(site)
    while name and type(model.get_submodule(name)).forward is nn.Module.forward:  # a mere list or dict of modules
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
    """The code that runs inside."""
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
    """A dropout module that only lends its rate: its owner, or a part of that, drops in its place (inside
    scaled_dot_product_attention, say). One functional dropout stands for one module, the nearest above it."""
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
    """Parts of a module whose code may drop for a site in it: no sites, nor far off with a rate of their own."""
    with_their_own = {id(site.module) for site in sites(model)}
    return [
        module
        for name, module in model.get_submodule(above).named_modules()
        if reads_mode(module) and id(module) not in with_their_own and not (name.count(".") and holds_rate(module))
    ]
