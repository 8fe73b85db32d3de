"""On what the logits of a place must not be trained: another's target, another token id, nothing, its opposite."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expect import fail
from .met_loss import MetLoss
from .reading import EXACT, Reading, gradient, read


def refuse_what_teaches_nothing(loss: MetLoss) -> None:
    """Fails, of a loss that is no cross entropy, if its gradient is the same whatever the targets, or the opposite."""
    logits = torch.randn(2, loss.places, loss.V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = loss.symbols[torch.arange(2 * loss.places).view(2, -1) % len(loss.symbols)]
    one, other = (gradient(loss, logits, labels, None) for labels in (targets, targets.roll(1, dims=1)))
    if len(loss.symbols) > 1 and not loss.inside_model and torch.equal(one, other):  # a model's may be an auxiliary one
        fail(
            "the gradient of the loss is the same whatever the targets are: they do not enter it, and nothing is "
            "learned from them",
            likely=("loss-without-targets",),
            advice="F.cross_entropy(logits.flatten(0, 1), targets.flatten()) reads both: is another tensor returned?",
        )
    if (
        read(lambda x, labels, mask: -loss.call(x, labels, mask), loss.symbols, loss.V, places=loss.places).error
        < EXACT
    ):
        fail(
            "the loss is minus a cross entropy: to make it small is to make every target improbable",
            likely=("loss-negated",),
            advice="log-probabilities are negated once: -log_probs[target], or nll_loss, which does it itself.",
        )


def refuse_strays(reading: Reading, shift: int, when: str) -> None:
    """Fails if some place is trained on another target than t + shift of its row."""
    T = reading.source.shape[1]
    strays = reading.used & (reading.source != torch.arange(reading.source.numel()).view_as(reading.source) + shift)
    if strays.any():
        b, t = (int(i) for i in strays.nonzero()[0])
        row, target = divmod(int(reading.source[b, t]), T)
        fail(
            f"{when}the logits at row {b}, position {t} are trained on target {target} of row {row}, not on "
            f"{f't + {shift}' if shift else 'its own'}: logits and targets are selected or ordered differently",
            likely=("logits-labels-reshape-order",),
            advice="Select both by one mask, and flatten both in one order.",
        )


def refuse_other_symbols(loss: MetLoss) -> None:
    """Fails if a target of one token id trains another, as after labels - 1."""
    logits = torch.zeros(2, loss.places, loss.V, dtype=torch.float64)
    wrong = {}
    for symbol in loss.symbols.tolist():
        pulled = gradient(loss, logits, torch.full((2, loss.places), symbol), None)
        trained = int(pulled.sum((0, 1)).argmin())
        if trained != symbol:
            wrong[symbol] = trained
    if wrong:
        symbol, trained = next(iter(wrong.items()))
        fail(
            f"a target of token id {symbol} trains token id {trained} ({len(wrong)} of {len(loss.symbols)} ids train "
            "another): the ids are changed on the way",
            likely=("loss-of-other-ids",),
            advice="Hand the token ids over as they are: no -1, no offset, no clamp.",
            trains=wrong,
        )


def refuse_crossings(source: Tensor, crossings: list[tuple[int, int]]) -> None:
    (b, t), T = crossings[0], source.shape[1]
    other, position = divmod(int(source[b, t]), T)
    says = f"rows are mixed: the logits at row {b}, position {t} are trained on row {other}'s target {position}"
    if all(place == T - 1 for _, place in crossings):
        fail(
            f"{says}, because the batch is flattened before it is shifted: the end of each row predicts the start of "
            "the next",
            likely=("flatten-then-shift",),
            advice="Cut logits[:, :-1] and labels[:, 1:] first, then flatten.",
            places=crossings,
        )
    fail(
        f"{says}: logits and targets are reshaped in different orders ({len(crossings)} of {source.numel()} places)",
        likely=("logits-labels-reshape-order",),
        advice="Flatten both as [B, T] → [B·T]; a transpose before one reshape needs the same before the other.",
        places=crossings,
    )


def refuse_shift(shift: int, declared: int | None) -> None:
    asked = "none or one" if declared is None else {0: "none", 1: "one"}.get(declared, str(declared))
    off = shift - (declared if declared is not None else int(shift > 0))
    meaning = {
        -1: "the token just read: copying its input solves it, and nothing is predicted",
        1: "the token after the next: the shift is made twice",
    }.get(off, f"{abs(off)} places away from the next token")
    fail(
        f"the loss shifts its targets by {shift}, asked for {asked}: the logits at position t are trained on "
        f"target t {'+' if shift >= 0 else '-'} {abs(shift)}, {meaning}",
        likely=("label-shift-missing",) if off < 0 else ("label-shifted-twice",),
        advice="Shift once: in the data (targets = tokens[:, 1:]) or in the loss (logits[:, :-1]), not in both.",
        shift=shift,
    )
