"""What a model's forward returns, with targets and without: logits or probabilities, and a loss. It judges nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, Where, shown
from ..meet.logits import standing_for
from ..probes.extra_arguments import targets_of
from ..subject import EXISTENCE, Subject
from ..watch.draws import seeded

ROWS, LENGTH = 3, 7  # of a call; all sizes differ
OF_LOGITS = {"CrossEntropyLoss", "cross_entropy"}


@dataclass(frozen=True)
class Answers:
    """What came back without and with targets, by its index in a tuple or its name in a dict or object."""

    model: nn.Module
    name: str  # of the parameter that takes targets
    tokens: Tensor
    alone: dict[str, Any]
    given: dict[str, Any]
    left: Any  # `last_loss` of the model after the call with targets
    optional: bool  # whether targets may be omitted; if not, `alone` is empty

    @property
    def filled(self) -> dict[str, Any]:
        """What comes back only with targets."""
        return {key: value for key, value in self.given.items() if value is not None and self.alone.get(key) is None}

    @property
    def losses(self) -> list[Any]:
        """Numbers, and tensors with one number in all, per row or per target."""
        return [value for value in leaves([*self.given.values(), self.left]) if self._is_loss(value)]

    def _is_loss(self, value: Any) -> bool:
        B, T = self.tokens.shape
        if not isinstance(value, Tensor):
            return isinstance(value, float)
        usual = {B, T, T - 1, B * T, B * (T - 1), 1}
        return value.is_floating_point() and value.dim() <= 2 and set(value.shape) <= usual

    @property
    def instead_of_a_loss(self) -> tuple[str, Any] | None:
        """The key and value of what came back where a loss was due; None if nothing can be meant as one."""
        wrong = {key: value for key, value in self.filled.items() if not _integers(value)}
        if not self.optional:  # what comes without targets is not known
            wrong = {key: value for key, value in wrong.items() if callable(value) or isinstance(value, ModuleType)}
        if len(self.given) == 1 and not _tensors(self.given):
            wrong = self.given
        if all(value is None for value in wrong.values()):
            return None
        return next(iter(wrong.items()))

    def logits(self, vocabulary: set[int]) -> tuple[str, Tensor] | None:
        """The logits without targets, with their key: [B, T, V], or [B, 1, V] or [B, V] of the last position."""
        B, T = self.tokens.shape
        shapes = {(*places, V) for V in vocabulary for places in ((B, T), (B, 1), (B,))}
        for key, value in self.alone.items():
            if isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) in shapes:
                return key, value.detach()
        return None

    def both_logits(self, vocabulary: set[int]) -> tuple[Tensor, Tensor]:
        """The logits with targets and without. Raises NotApplicable where one of them, or a loss, does not come."""
        alone = self.logits(vocabulary)
        if alone is None:
            raise NotApplicable("without targets forward returns no logits, neither [B, T, V] nor of the last position")
        key, without = alone
        given = self.beside(key, without.shape[-1])
        if given is None or not self.losses:
            raise NotApplicable(f"with {self.name} forward does not return logits and a loss", gives=list(self.given))
        return given, without

    def beside(self, key: str, V: int) -> Tensor | None:
        """The logits [B, T, V] with targets, flattened ones too; else a tensor of another width under the same key."""
        B, T = self.tokens.shape
        own = self.given.get(key) if self.given.keys() >= self.alone.keys() else None
        candidates = [x for x in (own, *leaves(list(self.given.values()))) if isinstance(x, Tensor)]
        for x in candidates:
            if x.is_floating_point() and x.shape in ((B, T, V), (B * T, V)):
                return x.detach().view(B, T, V)
        if isinstance(own, Tensor) and own.is_floating_point() and own.dim() == 3 and own.shape[:2] == (B, T):
            return own.detach()
        return None


def answers(subject: Subject, *, batch: int = 0) -> Answers:
    """On tokens of one draw or another. Raises NotApplicable for a model that takes no targets, or needs more."""
    parameter = targets_of(subject)
    if parameter is None:
        raise NotApplicable("forward takes no targets")
    optional = parameter.default is None
    model = subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=torch.float32)
    B, T = ROWS, min(LENGTH, subject.sizes.block_size)
    tokens, targets = (subject.tokens(B, T, seed=subject.seed + 2 * batch + n) for n in (1, 2))
    more = {parameter.name: targets}
    try:
        alone = slots(_drawing(model, tokens)) if optional else {}
        given, again = (slots(_drawing(model, tokens, seed, **more)) for seed in (0, 1))
    except Exception as error:
        raise NotApplicable(
            f"forward cannot be called with tokens and {parameter.name} alone", error=f"{type(error).__name__}: {error}"
        ) from None
    if any(not torch.equal(one, two) for one, two in zip(_tensors(given), _tensors(again), strict=True)):
        raise NotApplicable("forward draws random numbers in evaluation mode, so two calls cannot be compared")
    left = getattr(model, "last_loss", None)
    return Answers(model, parameter.name, tokens, in_place(alone, given), given, left, optional)


def _drawing(model: nn.Module, tokens: Tensor, seed: int = 0, **more: Any) -> Any:
    with seeded(seed):
        return model(tokens, **more)


def _integers(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def described(value: Any) -> str:
    """`a tensor [21, 17]`, `the function cross_entropy`."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


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
    """Gives a lone output without targets the key that it has among several outputs with targets."""
    if alone.keys() != {""} or "" in given:
        return alone
    wide = [key for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    key = "logits" if "logits" in wide else next(iter(wide), "")
    return {key: alone[""]}


def gives(subject: Subject) -> str:
    """What the model returns as its logits: "logits", "log-probabilities" or "probabilities"."""
    with torch.no_grad():
        return standing_for(subject.logits(subject.build(), subject.tokens(2, min(5, subject.sizes.block_size))))


def cross_entropy_line(subject: Subject) -> Where | None:
    """The line of the subject's code that names PyTorch's cross entropy, which expects logits.

    None where there is none, or where the code takes a logarithm itself: it may then mean probabilities.
    """
    found: Where | None = None
    for filename, nodes in subject.code():
        for node in nodes:
            if not isinstance(node, ast.Attribute | ast.Name):
                continue
            word = node.attr if isinstance(node, ast.Attribute) else node.id
            if word in ("log", "nll_loss", "NLLLoss"):
                return None
            if word in OF_LOGITS and found is None:
                found = Where(word, "", shown(filename), node.lineno)
    return found


def leaves(value: Any) -> Iterator[Any]:
    """The values inside nested lists, tuples and dicts."""
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


def trained_by_its_loss(subject: Subject, model: nn.Module, tokens: Tensor) -> set[str]:
    """The weights with a gradient from the loss that the model returns in train mode; none where it returns no loss."""
    parameter = targets_of(subject)
    if parameter is None:
        return set()
    try:
        given = {**subject.beside(model, tokens), parameter.name: tokens.roll(-1, dims=1)}
        output = model.train()(tokens, **given)
        losses = [x for x in leaves([*slots(output).values()]) if isinstance(x, Tensor) and x.dim() == 0]
        losses = [x for x in losses if x.is_floating_point() and x.requires_grad]
        return {name for loss in losses[:1] for name, slope in slopes(model, loss).items() if slope}
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError):
        return set()  # it needs more than tokens and targets
    finally:
        model.eval()


def untrained(found: Answers) -> list[str]:
    """The weights that the logits depend on and the loss does not."""
    losses = [x for x in found.losses if isinstance(x, Tensor) and x.requires_grad]
    alone = [x for x in _tensors(found.alone) if x.requires_grad] if found.optional else []
    if not losses or not alone:
        raise NotApplicable("forward returns no loss with a gradient, or no logits without targets")
    makes = slopes(found.model, torch.stack([x.double().square().sum() for x in alone]).sum())
    trains = slopes(found.model, torch.stack([x.double().sum() for x in losses]).sum())
    least = 1e-4 * max(makes.values(), default=0.0)  # the gradient of a key's bias is rounding error alone
    return [name for name, slope in makes.items() if slope > least and not trains[name]]


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits, and of probabilities."""
    logits = logits.double()
    sure = bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all())
    return (logits.log() if sure else logits).log_softmax(-1)
