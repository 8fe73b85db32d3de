"""Wrong targets: logits trained on another position's target, another token id, no target, or away from it."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ..expect import advise, fail
from ..subject import Subject
from ..watch.location import locate
from .met_loss import MetLoss
from .reading import EXACT, Reading, gradient, read


def refuse_what_teaches_nothing(loss: MetLoss, *, only: bool) -> None:
    """Fails if the gradient does not depend on the targets, or is that of minus a cross entropy.

    `only`: nothing else can be meant as the loss; of several numbers that a model returns, one may be auxiliary.
    """
    logits = torch.randn(2, loss.places, loss.V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = loss.symbols[torch.arange(2 * loss.places).view(2, -1) % len(loss.symbols)]
    one, other = (gradient(loss, logits, labels, None) for labels in (targets, targets.roll(1, dims=1)))
    if len(loss.symbols) > 1 and only and bool(one.any() if loss.inside_model else True) and torch.equal(one, other):
        fail(
            "the gradient of the loss is the same for any targets, so nothing is learned from them",
            likely=("loss-without-targets",),
            advice="return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), which depends on both",
        )
    negated = read(lambda x, labels, mask: -loss.call(x, labels, mask), loss.symbols, loss.V, places=loss.places)
    if negated.error < EXACT:
        fail(
            "the loss is minus a cross entropy: minimizing it makes every target less probable",
            likely=("loss-negated",),
            advice="negate once: use -log_probs[target], or nll_loss, which already negates",
        )


def refuse_strays(reading: Reading, shift: int, when: str) -> None:
    """Fails if the logits at some position t are not trained on target t + shift of their row."""
    T = reading.source.shape[1]
    strays = reading.used & (reading.source != torch.arange(reading.source.numel()).view_as(reading.source) + shift)
    if strays.any():
        b, t = (int(i) for i in strays.nonzero()[0])
        row, target = divmod(int(reading.source[b, t]), T)
        fail(
            f"{when}the logits at row {b}, position {t} are trained on target {target} of row {row}, expected target "
            f"{t + shift} of row {b}: logits and targets are selected or ordered differently",
            likely=("logits-labels-reshape-order",),
            advice="select logits and targets with the same mask, and flatten them in the same order",
        )


def refuse_other_symbols(loss: MetLoss) -> None:
    """Fails if a target of one token id trains another one, as after labels - 1."""
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
            f"a target of token id {symbol} trains token id {trained} ({len(wrong)} of {len(loss.symbols)} ids are "
            "wrong): the loss changes the ids of its targets",
            likely=("loss-of-other-ids",),
            advice="pass the token ids to cross_entropy unchanged: no -1, no offset, no clamp",
            trains=wrong,
        )


def refuse_crossings(source: Tensor, crossings: list[tuple[int, int]]) -> None:
    (b, t), T = crossings[0], source.shape[1]
    other, position = divmod(int(source[b, t]), T)
    says = f"rows are mixed: the logits at row {b}, position {t} are trained on row {other}'s target {position}"
    if all(place == T - 1 for _, place in crossings):
        fail(
            f"{says}: the batch is flattened before it is shifted, so the end of each row predicts the start of the "
            "next",
            likely=("flatten-then-shift",),
            advice="slice logits[:, :-1] and labels[:, 1:] first, then flatten",
            places=crossings,
        )
    fail(
        f"{says}: logits and targets are reshaped in different orders ({len(crossings)} of {source.numel()} positions)",
        likely=("logits-labels-reshape-order",),
        advice="flatten both from [B, T] to [B·T]; if one is transposed first, transpose the other too",
        places=crossings,
    )


def refuse_shift(shift: int, declared: int | None) -> None:
    asked = "0 or 1" if declared is None else str(declared)
    off = shift - (declared if declared is not None else int(shift > 0))
    meaning = {
        -1: "the token just read, so the model can copy its input and learns to predict nothing",
        1: "the token after the next, because the shift is applied twice",
    }.get(off, f"{abs(off)} positions away from the next token")
    fail(
        f"the loss shifts its targets by {shift}, expected {asked}: the logits at position t are trained on "
        f"target t {'+' if shift >= 0 else '-'} {abs(shift)}, {meaning}",
        likely=("label-shift-missing",) if off < 0 else ("label-shifted-twice",),
        advice="shift once, either in the data (targets = tokens[:, 1:]) or in the loss (logits[:, :-1])",
        shift=shift,
    )


def remark_on_an_unshifted_label(subject: Subject, loss: MetLoss) -> None:
    """Forward takes input_ids and labels, as the models of transformers do, but leaves the shift to its caller.

    A failure for a subclass of that library's models, whose trainers pass labels = input_ids; else a remark, where
    nothing in the file shows what is passed.
    """
    model = subject.build()
    taken = inspect.signature(model.forward).parameters
    of_transformers = "input_ids" in taken and "labels" in taken and "decoder_input_ids" not in taken
    if not (loss.inside_model and loss.shift == 0 and subject.causal and of_transformers):
        return
    says = (
        "forward does not shift its labels: the logits at position t are trained on labels[:, t], which is the token "
        "just read if labels are input_ids"
    )
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        fail(
            f"{says}, and that is what the trainers for a PreTrainedModel pass",
            where=locate(model, type(model).__name__),
            likely=("label-shift-missing", "labels-of-transformers-unshifted"),
            advice="compute the loss of logits[:, :-1] and labels[:, 1:]",
        )
    if not any(subject.part(name) for name in ("train_step", "trainer", "pad_batch", "batches")):
        advise(f"{says} (as the trainers of transformers pass them): right only if your training code shifts them")
