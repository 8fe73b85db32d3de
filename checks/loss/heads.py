"""Every prediction that a training forward makes: how far of the text it has read, and which token it is trained on.

A prediction is what the model passes to a cross entropy or a log-softmax. The token that it is trained on is the one
whose logit the loss raises; what it has read are the tokens that change it. Nothing here judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..expect import NotApplicable, Where
from ..probes.extra_arguments import targets_of
from ..subject import EXISTENCE, Subject
from ..watch.draws import seeded
from ..watch.location import line_now
from .returned import leaves, slots

PLACES = 7  # of the text
ONE_HOT = 0.4  # of the gradient's size that the target's entry has at least; it is half for a cross entropy
FIRST = (torch.Tensor.log_softmax, torch.log_softmax, nn.functional.log_softmax, nn.functional.cross_entropy)


@dataclass(frozen=True)
class Head:
    """One prediction of every position: the same distances at all of them."""

    read: int  # the last token that it has read, minus its position
    ahead: int  # the token that it is trained on, minus the last that it has read
    where: Where | None  # the line that computes its loss


class _Predictions(TorchFunctionMode):
    """Keeps the logits [places, V] that are passed to a loss, in order."""

    def __init__(self, V: int) -> None:
        super().__init__()
        self.V, self.logits, self.lines = V, list[Tensor](), list[Where | None]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in FIRST:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and (flat := self._flat(given)) is not None and flat.requires_grad:
                self.logits.append(given)
                self.lines.append(line_now())
        return function(*args, **kwargs)

    def _flat(self, given: Tensor) -> Tensor | None:
        """[places, V] of one row: [N, V], [1, T, V], [1, V, T]."""
        if given.dim() in (2, 3) and given.shape[-1] == self.V:
            return given.reshape(-1, self.V)
        if given.dim() == 3 and given.shape[:2] == (1, self.V):
            return given[0].T
        return None

    def rows(self) -> list[Tensor]:
        return [flat for given in self.logits if (flat := self._flat(given)) is not None]


@dataclass(frozen=True)
class _Trial:
    """A model in train mode, called with one row of tokens and one of targets, always with the same random numbers."""

    model: nn.Module
    targets: str
    V: int

    def __call__(self, tokens: Tensor, targets: Tensor) -> tuple[_Predictions, Tensor]:
        with seeded(0), _Predictions(self.V) as made:
            output = self.model(tokens[None], **{self.targets: targets[None]})
        losses = [x for x in leaves([*slots(output).values()]) if isinstance(x, Tensor) and x.dim() == 0]
        losses = [x for x in losses if x.is_floating_point() and x.requires_grad]
        if not losses or not made.logits:
            raise NotApplicable("in train mode the model returns no loss of its own, or computes none from logits")
        return made, losses[0]


def heads_of(subject: Subject) -> list[Head]:
    """The predictions that the model is trained on, its main one first. Raises NotApplicable if they are not known."""
    parameter = targets_of(subject)
    if parameter is None:
        raise NotApplicable("forward takes no targets")
    V, T = subject.sizes.vocab_size, min(PLACES, (subject.sizes.vocab_size - 1) // 2, subject.sizes.block_size)
    if T < 4:
        raise NotApplicable("too few token ids, or places, to tell targets apart")
    model = subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=torch.float32).train()
    trial = _Trial(model, parameter.name, subject.width)
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(subject.seed))[: 2 * T + 1].to(subject.device)
    try:
        return _heads(trial, ids, T)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
        raise NotApplicable(
            f"forward cannot be called with one row of {T} tokens and {parameter.name}",
            error=f"{type(error).__name__}: {error}",
        ) from None


def _heads(trial: _Trial, ids: Tensor, T: int) -> list[Head]:
    tokens, targets, spare = ids[:T], ids[T : 2 * T], ids[2 * T]
    apart, loss = trial(tokens, targets)
    main = _trained(apart, loss)[0]
    offset = _same({int((targets == i).nonzero()[0]) - t for t, i in main.items() if i in targets})
    if offset not in (0, 1):
        raise NotApplicable("the first prediction is not trained on its own target or the next")
    other = targets.clone()
    other[T // 2] = spare
    fed = not torch.equal(apart.rows()[0], trial(tokens, other)[0].rows()[0])  # the targets are a decoder's input
    text = ids[: T + 1 - offset] if not fed else ids[:T]

    def call(text: Tensor) -> tuple[_Predictions, Tensor]:
        if fed:
            return trial(tokens, text)
        return trial(text[:T], text[1:] if offset == 0 else text)

    made, loss = call(text)
    before, trained = made.rows(), _trained(made, loss)
    last = [torch.full((len(rows),), -2) for rows in before]  # the last token that each place has read
    for i in range(len(text)):
        changed = text.clone()
        changed[i] = spare
        for known, then, now in zip(last, before, call(changed)[0].rows(), strict=True):
            known[(then != now).any(-1).cpu()] = i
    found = []
    for known, ids_of, where in zip(last, trained, made.lines, strict=True):
        read, ahead = set(), set()
        for t, trained_id in ids_of.items():
            if known[t] >= 0 and (text == trained_id).any():
                read.add(int(known[t]) - t)
                ahead.add(int((text == trained_id).nonzero()[0]) - int(known[t]))
        if len(read) == len(ahead) == 1:
            found.append(Head(read.pop(), ahead.pop(), where))
    if not found:
        raise NotApplicable("no prediction is trained on one token of the text at a fixed distance")
    return found


def _same(values: set[int]) -> int | None:
    return values.pop() if len(values) == 1 else None


def _trained(made: _Predictions, loss: Tensor) -> list[dict[int, int]]:
    """For each prediction, by place: the token id that the loss raises there."""
    gradients = torch.autograd.grad(loss, made.logits, allow_unused=True)
    found = []
    for given, gradient in zip(made.logits, gradients, strict=True):
        rows = made._flat(torch.zeros_like(given) if gradient is None else gradient)
        assert rows is not None
        sizes = rows.abs().sum(-1)
        sure = (sizes > 1e-4 * sizes.max()) & (-rows.min(-1).values > ONE_HOT * sizes)
        found.append({int(t): int(rows[t].argmin()) for t in sure.nonzero()[:, 0]})
    return found
