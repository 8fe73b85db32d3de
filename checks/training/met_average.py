"""How to make, update, apply and take back a foreign moving average of a model's weights, and where it keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..meet.vocabulary import words
from ..probes.filled import called, roles_of
from ..subject import Companion

NAMES = {
    "model": "model net network module m online source online_model base_model",
    "parameters": "parameters params weights",
    "named": "named_parameters named_params",
    "state": "state_dict state",
    "decay": "decay ema_decay max_decay beta ema_beta",
    "share": "alpha rate mu tau momentum",  # the decay, or one less it
    "device": "device",
    "step": "step steps n iteration it global_step",
    "every": "update_every every interval update_interval update_freq",
    "after": "update_after_step update_after warmup_steps start_step ema_start start warmup",
}
UPDATES = ("update", "update_parameters", "forward")
STORES = ("store", "backup", "save_backup", "store_params", "save")
APPLIES = (
    "apply_shadow", "apply_ema", "apply_to", "copy_to", "apply_averages", "apply_weights", "swap_in", "swap", "apply",
    "average_parameters", "averaged", "applied", "ema_weights", "ema_scope", "load_into",
)  # fmt: skip
RESTORES = ("restore", "restore_model", "restore_weights", "swap_out", "swap_back", "unapply")
STARTS = ("register", "init", "initialize", "setup")


class MetAverage:
    """An average of the weights of `model`, made by the user's class; the model's parameters by name are averaged."""

    def __init__(self, companion: Companion, model: nn.Module, decay: float | None = None) -> None:
        self.companion, self.model, self.decay = companion, model, decay
        self.updates, self.place = 0, ""
        roles = roles_of(companion.value, NAMES)
        update = self._method(UPDATES, companion.value)
        if update is None:
            raise NotApplicable("it has no update")
        taken = {*roles.values(), *roles_of(getattr(companion.value, update), NAMES).values()}
        self.takes = next((role for role in ("decay", "share") if role in taken), None)
        self.waits = any(words_in(name) & WAITS for name, role in roles.items() if role not in ("every", "after"))
        try:
            self.made = called(companion.value, roles, self._values())
            if not self.read():  # some begin with a call of their own, others with the first update
                self._call(getattr(self.made, self._method(STARTS, self.made) or update))
        except NotApplicable:
            raise
        except Exception as error:
            said = (str(error).splitlines() or [""])[0][:120]
            raise NotApplicable(f"making it raises {type(error).__name__}: {said}") from None
        missing = self.read().keys() ^ {name for name, p in model.named_parameters() if p.requires_grad}
        if missing:
            raise NotApplicable(f"where it keeps its average of {min(missing)} was not found")

    def _values(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "model": self.model,
            "parameters": list(self.model.parameters()),
            "named": list(self.model.named_parameters()),
            "state": self.model.state_dict(),
            "device": next(self.model.parameters()).device,
            "every": 1,
            "after": 0,
            "step": self.updates,
        }
        return given if self.decay is None else {**given, "decay": self.decay, "share": self.decay}

    @staticmethod
    def _method(names: tuple[str, ...], of: Any) -> str | None:
        """The first of these methods, not counting those that every module has."""
        own = of if isinstance(of, type) else type(of)
        return next(
            (n for n in names if callable(getattr(own, n, None)) and getattr(nn.Module, n, 0) is not getattr(own, n)),
            None,
        )

    def _call(self, method: Callable[..., Any]) -> Any:
        return called(method, roles_of(method, NAMES), self._values())

    def update(self) -> None:
        name = self._method(UPDATES, self.made)
        assert name is not None
        self._call(getattr(self.made, name))
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[bool]:
        """While the averaged weights are in the model; gives whether they will be taken out again."""
        apply = self._method(APPLIES, self.made)
        if apply is None:
            raise NotApplicable("it has no method that puts its weights into the model")
        store, restore = self._method(STORES, self.made), self._method(RESTORES, self.made)
        restore = apply if apply == "swap" and restore is None else restore
        if store is not None:
            self._call(getattr(self.made, store))
        entered = self._call(getattr(self.made, apply))
        if hasattr(entered, "__enter__"):
            with entered:
                yield True
            return
        yield restore is not None
        if restore is not None:
            self._call(getattr(self.made, restore))

    def read(self) -> dict[str, Tensor]:
        """A copy of the average of each trainable parameter; {} where it is not found."""
        wanted = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        kept = dict(vars(self.made)) if hasattr(self.made, "__dict__") else {}
        if isinstance(self.made, nn.Module):
            kept |= {**dict(self.made.named_children()), "": self.made}
        for name, value in kept.items():
            found = _among(value, wanted, self.model) if not self.place or name == self.place else None
            if found is not None:
                self.place = name
                return found
        return {}


WAITS = words("every after start freq frequency interval warmup period delay begin from")


def words_in(name: str) -> frozenset[str]:
    return frozenset(name.lower().split("_"))


def plain(name: Any) -> str:
    """The name of a parameter, however a wrapper or a buffer's rules changed it."""
    return str(name).replace("_orig_mod.", "").removeprefix("module.").replace(".", "")


def _among(kept: Any, wanted: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of the wanted names in a container: a dict, a list in the order of the parameters, or a module."""
    if kept is model:
        return None
    if isinstance(kept, nn.Module):
        kept = dict(kept.named_parameters()) | dict(kept.named_buffers())
    if isinstance(kept, Mapping):
        named = {plain(name): value for name, value in kept.items()}
        if all(isinstance(named.get(plain(name)), Tensor) for name in wanted):
            kept = [named[plain(name)] for name in wanted]
        elif all(id(p) in kept for p in wanted.values()):
            kept = [kept[id(p)] for p in wanted.values()]
        else:
            return None
    if not isinstance(kept, list | tuple) or len(kept) != len(wanted):
        return None
    pairs = list(zip(wanted.items(), kept, strict=True))
    if all(isinstance(value, Tensor) and value.shape == p.shape for (_, p), value in pairs):
        return {name: value.detach().clone() for (name, _), value in pairs}
    return None


@torch.no_grad()
def move(model: nn.Module, seed: int) -> None:
    """Other weights, each by about one more or less than it was."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator).to(p))
