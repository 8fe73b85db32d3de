"""A row's logits at real tokens must not depend on padding, on other rows, or on other documents packed beside it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .expect import STEADY, NotApplicable, Where, advise, drawn, expect_close, fail, farthest, needs, note
from .probes.experts import ROUTED, expect_room, router_suspects
from .probes.extra_arguments import DOCUMENTS, POSITIONS, taken
from .probes.influence import call, every_id, length, moved, reads_one_token, some_of
from .probes.magnified import EXTREME, magnified, within_reach
from .probes.padding import SIDES, padded, ragged
from .probes.precision import precise, precision, precision_of_positions, shared, spread
from .probes.preconditions import expect_takes_mask
from .subject import Subject
from .watch.calls import first_bad, first_breaking
from .ways import EVAL, TRAIN, Way

FLOAT_MASKS = ("float-mask-added", "bool-mask-added-as-float")
CONTENT = "check_masking.check_pad_contents_change_nothing"
PADDED_ROWS = "check_masking.check_rows_of_padding_do_no_harm"
ONES = "check_masking.check_mask_of_ones_changes_nothing"
ADVICE = "Mask padded keys for every query of the same row: apply mask[:, None, None, :] to the scores [B, H, T, S]."


@needs(*STEADY)
def check_mask_of_ones_changes_nothing(subject: Subject) -> None:
    """A padding mask that marks every token as real must give the same logits as no mask."""
    expect_takes_mask(subject)
    model, T = precise(subject), length(subject)
    for t in (1, 2, T // 2, T):
        tokens = subject.tokens(3, max(t, 1), seed=subject.seed)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        want = call(subject, model, tokens)
        expect_close(
            call(subject, model, tokens, mask),
            want,
            bound=precision(subject).bound(want),
            says=f"a mask that marks all {t} tokens as real changes the logits",
            likely=("bool-mask-semantics-inverted", "bool-mask-added-as-float", "pad-mask-replaces-causal"),
            advice="Check what True means: keep for scaled_dot_product_attention, drop for nn.MultiheadAttention.",
        )


@needs(*STEADY, ONES)
def check_pad_contents_change_nothing(subject: Subject) -> None:
    """Token ids in the padding must not change the logits of real tokens, on either side, in eval and train mode."""
    expect_takes_mask(subject)
    for model, weights in ((precise(subject), ""), (magnified(subject), f", weights × {EXTREME}")):
        if weights and not within_reach(subject, model):
            continue
        for side in ("left", "right"):
            for way in (EVAL, TRAIN):
                expect_pads_unread(subject, model, side, Way(f"{way.name}{weights}", way.training))


def expect_pads_unread(subject: Subject, model: nn.Module, side: str, way: Way) -> None:
    T = length(subject)
    tokens = every_id(subject, T, rows=8, seed=subject.seed)
    mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
    before = call(subject, model, tokens, mask, way)
    bound = precision(subject).bound(before)
    shifts = list(range(1, subject.sizes.vocab_size, 3))
    few = subject.affordable(tokens.numel(), len(shifts), least=2, sweeps=0.25)
    for shift in some_of(shifts, few, seed=subject.seed):
        other = torch.where(mask, tokens, (tokens + shift) % subject.sizes.vocab_size)
        after = call(subject, model, other, mask, way)
        moves = torch.where(mask, moved(before, after), 0.0)
        hits = (moves > bound.size).nonzero()
        if len(hits):
            row, t = (int(i) for i in hits[0])
            fail(
                f"changing the ids in the padding on the {side} changes the logits of real tokens, first in row {row} "
                "at "
                f"position {t}, by {float(moves[row, t]) / spread(before):.3g} standard deviations of the logits "
                f"({way.name}); allowed {bound}",
                where=pad_reader(subject, model, (tokens, other), mask, way),
                likely=likely_readers(subject, model, (tokens, other), mask, way, row),
                advice=ADVICE,
                first={"row": row, "t": t},
                mask=mask[row].tolist(),
            )


def likely_readers(
    subject: Subject, model: nn.Module, tokens: tuple[Tensor, Tensor], mask: Tensor, way: Way, row: int
) -> tuple[str, ...]:
    """Known bugs: a mask that changes nothing is not used; a row that is right alone gets the mask of another row."""
    if torch.equal(call(subject, model, tokens[0], mask, way), call(subject, model, tokens[0], None, way)):
        return "pad-mask-ignored", "pad-mask-on-queries"
    one, other = (call(subject, model, x[row : row + 1], mask[row : row + 1], way)[0] for x in tokens)
    if torch.equal(one[mask[row]], other[mask[row]]):
        return "mask-repeated-in-wrong-head-batch-order", "pad-mask-on-queries"
    return "pad-mask-on-queries", "pad-mask-ignored", "mask-fill-not-negative-enough", "bool-mask-added-as-float"


def pad_reader(
    subject: Subject, model: nn.Module, tokens: tuple[Tensor, Tensor], mask: Tensor, way: Way
) -> Where | None:
    """The first module whose output at a real token depends on the ids in the padding."""
    B, T = mask.shape

    def breaks(one: Tensor, other: Tensor) -> bool:
        if one.shape[0] != B or T not in one.shape[1:]:
            return False
        time = 1 + one.shape[1:].index(T)
        differ = ((one != other) & ~(one.isnan() & other.isnan())).movedim(time, 1).flatten(2).any(dim=2)
        return bool((differ & mask).any())

    one, other = (partial(call, subject, model, x, mask, way) for x in tokens)
    return first_breaking(model, one, other, breaks)


@needs(*STEADY, ONES, CONTENT)
def check_rows_of_padding_do_no_harm(subject: Subject) -> None:
    """With padding, logits and gradients must be finite, and a row of only padding must not change the other rows."""
    expect_takes_mask(subject)
    T = length(subject)
    tokens = every_id(subject, T, rows=5, seed=subject.seed)
    for side in ("right", "left"):
        mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
        for training in (False, True):
            expect_finite(subject, tokens, mask, side, training)
    mask[1] = False
    expect_harmless(subject, tokens, mask)


FULLY_MASKED: dict[str, Any] = dict(
    likely=("fully-masked-row-nan",),
    advice="Let every padded token attend to itself: a softmax over no keys is NaN, and NaN times a zero weight is "
    "still NaN.",
)


def expect_finite(subject: Subject, tokens: Tensor, mask: Tensor, side: str, training: bool) -> None:
    model = precise(subject).train(training)
    logits = subject.logits(model, tokens, mask)
    case = f"padding on the {side}, {'train' if training else 'eval'} mode"
    _expect_finite(subject, model, tokens, mask, logits, case)
    if not training:  # without gradients PyTorch's own layers take another path
        alone = call(subject, model, tokens, mask)
        _expect_finite(subject, model, tokens, mask, alone, f"{case} under torch.no_grad()")
    if (name := not_finite(model, logits, mask)) is not None:
        fail(
            f"the gradient of {name} is not finite, for a loss over real tokens ({case})",
            **FULLY_MASKED,
            parameter=name,
        )


def not_finite(model: nn.Module, logits: Tensor, mask: Tensor) -> str | None:
    """The first parameter whose gradient is not finite, for a loss over real tokens."""
    torch.autograd.backward(logits[mask].square().mean())
    grads = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return next((name for name, grad in grads if grad is not None and not bool(grad.isfinite().all())), None)


def expect_harmless(subject: Subject, tokens: Tensor, mask: Tensor) -> None:
    """A row of nothing but padding, row 1, leaves the others alone; what it does to itself and to training is told."""
    model, rest = precise(subject), [row for row in range(len(tokens)) if row != 1]
    want, logits = call(subject, model, tokens[rest], mask[rest]), subject.logits(model, tokens, mask)
    says = "a row of nothing but padding changes the logits of the other rows"
    expect_close(logits[rest].detach(), want, bound=precision(subject).bound(want), says=says, **FULLY_MASKED)
    if not bool(logits.isfinite().all()):
        name = not_finite(model, logits, mask)
        then = f", and the gradient of {name} NaN: a batch with such a row ends the training" if name else ""
        advise(f"a row of nothing but padding makes its own logits NaN{then}")


def _expect_finite(subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor, logits: Tensor, case: str) -> None:
    bad = (~logits.isfinite()).nonzero()
    if not len(bad):
        return
    row, t = int(bad[0, 0]), int(bad[0, 1])
    which = "a real token" if bool(mask[row, t]) else "a padded token"
    with torch.set_grad_enabled(logits.requires_grad):
        where = first_bad(model, lambda: subject.logits(model, tokens, mask), lambda x: bool((~x.isfinite()).any()))
    fail(
        f"the logits of {which} are not finite, first in row {row} at position {t} ({case})",
        where=where,
        **FULLY_MASKED,
    )


@st.composite
def batches(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    """The number of real tokens of each row, and the length to which all are padded."""
    real = draw(st.lists(st.integers(1, length(subject)), min_size=1, max_size=4))
    return dict(real=real, length=draw(st.integers(max(real), length(subject))), seed=draw(st.integers(0, 2**16)))


@needs(*STEADY, ONES, CONTENT)
@drawn(when=expect_takes_mask, case=batches)
def check_right_padding_changes_nothing(subject: Subject, case: dict[str, Any]) -> None:
    """Right padding, however long, must not change the logits of a row's real tokens."""
    expect_as_alone(
        subject,
        case,
        "right",
        likely=("pad-mask-on-queries", "pad-mask-replaces-causal"),
        advice="Hide padded keys with mask[:, None, None, :] in addition to the causal mask, not instead of it.",
    )


@needs(*STEADY, ONES, CONTENT, PADDED_ROWS)
@drawn(when=expect_takes_mask, case=batches)
def check_left_padding_changes_nothing(subject: Subject, case: dict[str, Any]) -> None:
    """Left padding, however long, must not change the logits of a row's real tokens."""
    if taken(subject, POSITIONS):
        raise NotApplicable("forward takes position ids: with left padding the caller must choose them")
    expect_as_alone(
        subject,
        case,
        "left",
        likely=("left-pad-positions-not-from-mask", "pad-mask-ignored"),
        advice="Count positions from the mask: (mask.cumsum(dim=1) - 1).clamp(min=0).",
    )


def expect_as_alone(subject: Subject, case: dict[str, Any], side: str, **finding: Any) -> None:
    """On the left, padding shifts the positions of a row's tokens."""
    model, real, T = shared(subject), torch.tensor(case["real"]), case["length"]
    exact = precision_of_positions(subject) if side == "left" else precision(subject)
    mask = padded(real, T, side).to(subject.device)
    tokens = subject.tokens(len(real), T, seed=case["seed"])
    got = call(subject, model, tokens, mask)
    for row, n in enumerate(case["real"]):
        want = call(subject, model, tokens[row : row + 1, mask[row]].contiguous())
        expect_close(
            got[row, mask[row]],
            want[0],
            bound=exact.bound(want),
            says=f"a row of length {n}, padded on the {side} to length {T}, gets different logits than alone (row "
            f"{row} "
            f"of {len(real)})",
            axes=("real token", "symbol"),
            row=row,
            **finding,
        )


@needs(*STEADY, ONES)
def check_mask_types_agree(subject: Subject) -> None:
    """A padding mask of 0 and 1, as int or float, must mean the same as the bool mask, or be refused."""
    expect_takes_mask(subject)
    model, T = precise(subject), length(subject)
    tokens = every_id(subject, T, rows=5, seed=subject.seed)
    refused = []
    for side in SIDES:
        mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
        want = call(subject, model, tokens, mask)
        for dtype, written, way in other_types(subject, mask):
            name = str(dtype).removeprefix("torch.")
            try:
                got = call(subject, model, tokens, written, way)
            except Exception as error:
                refused.append(f"{name}: {type(error).__name__}")
                continue
            says = f"a 0/1 mask as {name} gives different logits than the same mask as bool (padding: {side})"
            bound = precision(subject).bound(want)
            if subject.foreign and dtype.is_floating_point and farthest(got[mask], want[mask]) > bound.size:
                advise(f"{says}: it may be meant as an additive mask")
                continue
            expect_close(
                got[mask],
                want[mask],
                bound=bound,
                says=says,
                axes=("real token", "symbol"),
                likely=("int-mask-read-otherwise",) if not dtype.is_floating_point else FLOAT_MASKS,
                advice="Convert the mask with .bool(), or refuse other types: scaled_dot_product_attention adds float "
                "masks "
                "to the scores.",
            )
    note(refused=sorted(set(refused)))


def other_types(subject: Subject, mask: Tensor) -> Iterator[tuple[torch.dtype, Tensor, Way]]:
    """The mask in types other than the model's own. For a foreign model each type has a form of its own."""
    if not subject.foreign:
        for dtype in (torch.int64, torch.uint8, torch.float32, torch.float64):
            yield dtype, mask.to(dtype), EVAL
        return
    for form in subject.mask_forms[1:]:
        yield form.dtype, mask, Way(f"with {form}", more={"form": form})


@needs(*STEADY)
def check_packed_documents_stay_apart(subject: Subject) -> None:
    """Documents packed into one row, with their document ids given, must get the same logits as each alone."""
    parameter = taken(subject, DOCUMENTS)
    if parameter is None:
        raise NotApplicable("forward takes no document ids")
    positions = taken(subject, POSITIONS)  # counted by the caller, then
    model, T = precise(subject), length(subject)
    for cuts in ((T // 2,), (1, T // 3), (2, 3, T - 1)):
        bounds = [0, *cuts, T]
        tokens = subject.tokens(2, T, seed=subject.seed)
        ids, counted = torch.zeros_like(tokens), torch.arange(T, device=tokens.device).repeat(len(tokens), 1)
        for cut in cuts:
            ids[:, cut:] += 1
            counted[:, cut:] = torch.arange(T - cut, device=tokens.device)
        given = {parameter.name: ids, **({positions.name: counted} if positions is not None else {})}
        got = call(subject, model, tokens, way=Way("with document ids", more=given))
        for document, (start, end) in enumerate(pairwise(bounds)):
            want = call(subject, model, tokens[:, start:end].contiguous())
            expect_close(
                got[:, start:end],
                want,
                bound=precision(subject).bound(want),
                says=f"document {document} (tokens {start} to {end - 1} of {T} in the row) gets different logits than "
                "alone",
                likely=("packing-cross-contamination", "packing-positions-not-reset"),
                advice="Attend only where document ids are equal, and count positions from the start of each document.",
                document=document,
            )


@st.composite
def compositions(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    """A batch size and an order of its rows, with or without padding, in eval or train mode."""
    rows = draw(st.integers(2, 5))
    return dict(
        order=draw(st.permutations(range(rows))),
        length=draw(st.integers(1 if reads_one_token(subject, shared(subject)) else 2, length(subject))),
        padding=draw(st.sampled_from((None, "right", "left") if subject.takes_mask else (None,))),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@needs(*STEADY)
@drawn(case=compositions)
def check_rows_do_not_touch(subject: Subject, case: dict[str, Any]) -> None:
    """A row's logits must not depend on the other rows of the batch or on their order, in eval and train mode."""
    model, order, T = shared(subject), case["order"], case["length"]
    tokens = subject.tokens(len(order), T, seed=case["seed"])
    mask = None
    if case["padding"] is not None:
        mask = ragged(len(order), T, case["padding"], seed=case["seed"]).to(subject.device)
    expect_unmoved_by_other_rows(subject, model, tokens, mask, TRAIN if case["training"] else EVAL)
    whole = call(subject, model, tokens, mask)
    finding: dict[str, Any] = dict(
        bound=precision(subject).bound(whole),
        likely=("head-batch-axes-confused", "batch-statistics", "mask-repeated-in-wrong-head-batch-order"),
        advice="Look for a view or reshape that mixes the batch axis, a mean over it, or a mask repeated in another "
        "order.",
    )
    got = call(subject, model, tokens[order], None if mask is None else mask[order])
    expect_close(
        got, whole[order], says=f"putting the rows of the batch in the order {order} changes their logits", **finding
    )
    for row in range(len(order)):
        alone = call(subject, model, tokens[row : row + 1], None if mask is None else mask[row : row + 1])
        says = f"row {row} of {len(order)} gets different logits in the batch than alone"
        expect_close(whole[row : row + 1], alone, says=says, **finding)


def expect_unmoved_by_other_rows(
    subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None, way: Way
) -> None:
    """Changes the tokens of all other rows, at equal shapes and with the same dropout seed."""
    others = subject.tokens(*tokens.shape, seed=subject.seed + 7)
    before = call(subject, model, tokens, mask, way)
    bound = precision(subject).bound(before)
    for row in range(len(tokens)):
        changed = others.clone()
        changed[row] = tokens[row]
        after = call(subject, model, changed, mask, way)
        move = float(moved(before, after)[row].max())
        if move > bound.size:
            where = row_mixer(subject, model, (tokens, changed), mask, way, row)
            expect_room(subject, model, tokens, way, where)
            routed = router_suspects(model, where)
            fail(
                f"changing the tokens of the other rows changes the logits of row {row} of {len(tokens)}, by "
                f"{move / spread(before):.3g} standard deviations of the logits ({way.name}); allowed {bound}",
                where=where,
                likely=(
                    *routed,
                    "head-batch-axes-confused",
                    "batch-statistics",
                    "mask-repeated-in-wrong-head-batch-order",
                ),
                advice=ROUTED
                if routed
                else "Look for a reshape, a sum or a statistic over the batch axis (axis 0): nothing else mixes rows.",
                row=row,
            )


def row_mixer(
    subject: Subject, model: nn.Module, tokens: tuple[Tensor, Tensor], mask: Tensor | None, way: Way, row: int
) -> Where | None:
    """The first module whose output for this row depends on another row."""

    def breaks(one: Tensor, other: Tensor) -> bool:
        rows = one.shape[:1] == (len(tokens[0]),)
        return rows and bool(((one[row] != other[row]) & ~(one[row].isnan() & other[row].isnan())).any())

    one, other = (partial(call, subject, model, x, mask, way) for x in tokens)
    return first_breaking(model, one, other, breaks)
