"""What a model's forward gives when it is handed targets, beside what it gives without them. Nothing here judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..probes.extra_arguments import TARGETS, taken
from ..subject import EXISTENCE, Subject
from ..watch.draws import seeded

ROWS, LENGTH = 3, 7  # of a call; all sizes differ


@dataclass(frozen=True)
class Answers:
    """What came back without and with targets, by the place in a tuple or the name in a dict or object."""

    model: nn.Module
    name: str  # of the parameter that takes targets
    tokens: Tensor
    alone: dict[str, Any]
    given: dict[str, Any]
    left: Any  # what the call with targets left in `last_loss`
    optional: bool  # targets may be left out; where not, nothing is known of what comes without

    @property
    def filled(self) -> dict[str, Any]:
        """What is there with targets only."""
        return {key: value for key, value in self.given.items() if value is not None and self.alone.get(key) is None}

    @property
    def losses(self) -> list[Any]:
        """Numbers, and tensors of one number for all, for each row or for each target."""
        return [value for value in leaves([*self.given.values(), self.left]) if self._is_loss(value)]

    def _is_loss(self, value: Any) -> bool:
        B, T = self.tokens.shape
        if not isinstance(value, Tensor):
            return isinstance(value, float)
        usual = {B, T, T - 1, B * T, B * (T - 1), 1}
        return value.is_floating_point() and value.dim() <= 2 and set(value.shape) <= usual

    def logits(self, vocabulary: set[int]) -> tuple[str, Tensor] | None:
        """Without targets: where they stand, and [B, T, V], or [B, 1, V] and [B, V] of the last position."""
        B, T = self.tokens.shape
        shapes = {(*places, V) for V in vocabulary for places in ((B, T), (B, 1), (B,))}
        for key, value in self.alone.items():
            if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in shapes:
                return key, value.detach()
        return None

    def beside(self, key: str, V: int) -> Tensor | None:
        """With targets: the logits [B, T, V], flattened ones too; a tensor of another width that stands in their place;
        None if nothing does."""
        B, T = self.tokens.shape
        own = self.given.get(key) if self.given.keys() >= self.alone.keys() else None
        candidates = [x for x in (own, *leaves(list(self.given.values()))) if isinstance(x, Tensor)]
        for x in candidates:
            if x.is_floating_point() and x.shape in ((B, T, V), (B * T, V)):
                return x.detach().view(B, T, V)
        wrong = isinstance(own, Tensor) and own.is_floating_point() and own.dim() == 3 and own.shape[:2] == (B, T)
        return own.detach() if wrong else None  # type: ignore[union-attr]


def answers(subject: Subject) -> Answers:
    """Raises NotApplicable for a model that takes no targets, or not beside tokens alone."""
    parameter = taken(subject, TARGETS)
    if parameter is None or parameter.default not in (None, parameter.empty):
        raise NotApplicable("forward takes no targets")
    optional = parameter.default is None
    model = subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=torch.float32)
    B, T = ROWS, min(LENGTH, subject.sizes.block_size)
    tokens, targets = (subject.tokens(B, T, seed=subject.seed + n) for n in (1, 2))
    more = {parameter.name: targets}
    try:
        alone = slots(_drawing(model, tokens)) if optional else {}
        given, again = (slots(_drawing(model, tokens, seed, **more)) for seed in (0, 1))
    except Exception as error:
        raise NotApplicable(
            f"forward takes {parameter.name}, but not beside tokens alone", error=f"{type(error).__name__}: {error}"
        ) from None
    if any(not torch.equal(one, two) for one, two in zip(_tensors(given), _tensors(again), strict=True)):
        raise NotApplicable("in evaluation mode forward draws random numbers: two calls cannot be compared")
    left = getattr(model, "last_loss", None)
    return Answers(model, parameter.name, tokens, in_place(alone, given), given, left, optional)


def _drawing(model: nn.Module, tokens: Tensor, seed: int = 0, **more: Any) -> Any:
    with seeded(seed):
        return model(tokens, **more)


def _tensors(found: dict[str, Any]) -> list[Tensor]:
    return [x for x in leaves([*found.values()]) if isinstance(x, Tensor)]


def slots(output: Any) -> dict[str, Any]:
    """The parts of what a forward returned."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        return {str(key): value for key, value in zip(names, output, strict=True)}
    if not isinstance(output, Tensor | nn.Module) and (hasattr(output, "loss") or hasattr(output, "logits")):
        return dict(vars(output))
    return {"": output}


def in_place(alone: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What comes back by itself without targets, under the name that it has among several with them."""
    if alone.keys() != {""} or "" in given:
        return alone
    wide = [key for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    key = "logits" if "logits" in wide else next(iter(wide), "")
    return {key: alone[""]}


def leaves(value: Any) -> Iterator[Any]:
    """What is inside nested lists, tuples and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def slopes(model: nn.Module, value: Tensor) -> dict[str, float]:
    """The largest entry of the gradient to every trained parameter; 0 where there is none."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not value.requires_grad:
        return dict.fromkeys(parameters, 0.0)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name: 0.0 if g is None else float(g.abs().max()) for name, g in zip(parameters, found, strict=True)}
