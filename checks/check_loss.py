"""Next-token loss under a loss mask: which targets count, how much, and what the gradient is.

The subject's own `loss`, or the one that its model returns. How it is called and what it does are found in
loss_conventions.py; a reduction or a shift that is usual is no failure unless the subject declares another.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .expect import Bound, NotApplicable, advise, drawn, expect_close, expect_same, fail, needs, note
from .loss.cases import (
    all_kept,
    cause,
    closed_form,
    draw_case,
    given,
    masks,
    named,
    precision,
    problem,
    readable,
    reduction,
    sample,
    weights_of,
)
from .loss.explained import misread_mask, spans
from .loss.formula import USUAL, cross_entropy, expected_gradient
from .loss.given import cross_entropy_line, gives
from .loss.met_loss import met_loss
from .loss.placing import (
    refuse_crossings,
    refuse_other_symbols,
    refuse_shift,
    refuse_strays,
    refuse_what_teaches_nothing,
)
from .loss.reading import NoGradient, gradient, read
from .loss.returned import answers, leaves, slopes
from .probes.precision import spread
from .subject import Subject
from .watch.location import locate

PLACE = ("row", "position", "symbol")
GIVES = "check_loss.check_targets_give_a_loss"
UNDERSTOOD = "check_loss.check_a_place_is_trained_on_its_own_target"
DROPPED = "check_loss.check_no_target_is_dropped"
MASK = "check_loss.check_mask_drops_its_targets_and_no_others"
PURE = "check_loss.check_loss_leaves_its_inputs_alone"
VALUE = "check_loss.check_value_is_the_closed_form"


def check_targets_give_a_loss(subject: Subject) -> None:
    """A forward that is handed targets gives a loss: a number, or one for each row or target."""
    found = answers(subject)
    if found.losses:
        return
    wrong = {key: value for key, value in found.filled.items() if not _integers(value)}
    if not found.optional:  # what comes without them is not known
        wrong = {key: value for key, value in wrong.items() if callable(value) or isinstance(value, ModuleType)}
    if len(found.given) == 1 and not any(isinstance(value, Tensor) for value in leaves([*found.given.values()])):
        wrong = found.given
    if not wrong or all(value is None for value in wrong.values()):
        raise NotApplicable(f"forward takes {found.name} and gives what it gives without", gives=list(found.given))
    key, value = next(iter(wrong.items()))
    fail(
        f"handed {found.name}, forward gives {_described(value)}{f' as {_place(key)}' if key else ''}"
        f"{', where without them it gives nothing' if found.optional else ''}: this is no loss, and nothing else is",
        where=locate(found.model, type(found.model).__name__),
        likely=("loss-never-computed", "loss-is-a-function"),
        advice="return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1)): is it called at all?",
    )


def _integers(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def _place(key: str) -> str:
    return f"output[{key}]" if key.isdigit() else key


@needs("check_contract.check_logits_have_shape")
def check_targets_leave_the_logits_as_they_are(subject: Subject) -> None:
    """The logits that come with a loss are those that come without targets."""
    found = answers(subject)
    widths = {subject.sizes.vocab_size, subject.width}
    alone = found.logits(widths)
    if alone is None:
        raise NotApplicable("no logits [B, T, V] or of the last position come without targets")
    key, want = alone
    got = found.beside(key, want.shape[-1])
    if got is None or not found.losses:
        raise NotApplicable(f"with {found.name} no logits come back, or no loss beside them", gives=list(found.given))
    where = locate(found.model, type(found.model).__name__)
    if got.shape[-1] != want.shape[-1]:
        fail(
            f"with {found.name} forward gives {list(got.shape)} where the logits stand, without them "
            f"{list(want.shape)}: {got.shape[-1]} numbers for {want.shape[-1]} symbols are no logits, and a loss of "
            "them trains no head",
            where=where,
            likely=("loss-of-hidden-states",),
            advice="logits = head(x) before both the loss and the return.",
        )
    last = want.dim() < 3 or want.shape[1] < got.shape[1]
    got, want = (x.reshape(len(x), -1, x.shape[-1])[:, -1:] if last else x for x in (got, want))
    expect_close(
        _normalized(got), _normalized(want), bound=Bound(1e-3 * spread(want), "1e-3 standard deviations of the logits"),
        axes=PLACE, where=lambda: where, likely=("loss-of-other-logits",),
        says=f"with {found.name} forward gives other logits{' for the last position' if last else ''} than without: it "
        "is trained as one model and used as another",
        advice="compute the logits once, for both; without targets, take the last position of x, after the last norm.",
    )  # fmt: skip


def _normalized(logits: Tensor) -> Tensor:
    """Log-probabilities, also of logits and of probabilities."""
    logits = logits.double()
    sure = bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all())
    return (logits.log() if sure else logits).log_softmax(-1)


@needs(GIVES, "check_loss.check_targets_leave_the_logits_as_they_are")
def check_the_loss_trains_what_makes_the_logits(subject: Subject) -> None:
    """Every weight that the logits depend on has a gradient of the loss that the model returns."""
    found = answers(subject)
    losses = [x for x in found.losses if isinstance(x, Tensor) and x.requires_grad]
    alone = [
        x
        for x in leaves([*found.alone.values()] if found.optional else [])
        if isinstance(x, Tensor) and x.requires_grad
    ]
    if not losses or not alone:
        raise NotApplicable("no loss with a gradient comes with targets, or no logits without")
    makes = slopes(found.model, sum(x.double().square().sum() for x in alone))  # type: ignore[arg-type]
    trains = slopes(found.model, sum(x.double().sum() for x in losses))  # type: ignore[arg-type]
    least = 1e-4 * max(makes.values(), default=0.0)  # a key's bias has rounding alone
    left = [name for name, slope in makes.items() if slope > least and not trains[name]]
    if left:
        fail(
            f"the logits depend on {left[0]}, but the loss that forward gives with {found.name} has no gradient there: "
            f"it stays as it was drawn" + (f"; so do {len(left) - 1} more" if len(left) > 1 else ""),
            where=locate(found.model, left[0].rpartition(".")[0] or type(found.model).__name__),
            likely=("loss-beside-the-head",),
            advice="the loss must be made of the logits that are returned: no detach, no other tensor.",
            weights=left,
        )


def check_a_place_is_trained_on_its_own_target(subject: Subject) -> None:
    """The logits of a place are trained on one target of the same row, with the same shift at every place."""
    try:
        loss = met_loss(subject)
    except NoGradient as error:
        fail(f"nothing can be learned from this loss: {error}", advice="Return the tensor: no .item(), no .detach().")
    note(called=loss.says, takes=loss.domain, shift=loss.shift, masks=loss.masks, reduction=loss.reduction or "unknown")
    for other in loss.also_runs:
        advise(f"{other} runs too, but is no cross entropy: the loss is right only as {loss.says}")
    reading = loss.reading
    if reading is None:
        refuse_what_teaches_nothing(loss)
        raise NotApplicable("the gradient is not that of a cross entropy, so no place can be told", called=loss.says)
    refuse_other_symbols(loss)
    if reading.crossings:
        refuse_crossings(reading.source, reading.crossings)
    declared = subject.declared("shift")
    if loss.shift not in ((0, 1) if declared is None else (declared,)):
        refuse_shift(loss.shift, declared)
    refuse_strays(reading, loss.shift, "")


@needs(UNDERSTOOD)
def check_no_target_is_dropped(subject: Subject) -> None:
    """Without a mask every target of every row carries loss, but for those that the subject declares to skip."""
    loss = readable(subject)
    used = read(loss, loss.symbols, loss.V, places=loss.places).used
    places, skip = used.shape[1], subject.declared("skip")
    asked = loss.dropped if skip is None else tuple(range(skip))
    if loss.dropped and skip is None:
        advise(f"the loss drops {named(loss.dropped)} of every row by itself, counted from 0")
    note(dropped=spans(loss.dropped))
    for row, kept in enumerate(used):
        dropped = tuple(t for t in range(places) if not kept[t])
        if dropped != asked:
            last = dropped == (*asked, places - 1)
            whole = "nothing of this row is trained" if not kept.any() else "the last target is never trained" * last
            fail(
                f"without a mask the loss drops {named(dropped)} of row {row} (of 0-{places - 1}); asked for "
                f"{spans(asked) or 'none'}" + f": {whole}" * bool(whole),
                likely=("last-target-dropped",) if last else (),
                advice="Look for [:-1] or [1:] cut from the targets a second time, or for a mask of one place too few.",
                dropped=list(dropped),
            )


@needs(UNDERSTOOD, DROPPED)
def check_mask_drops_its_targets_and_no_others(subject: Subject) -> None:
    """A masked target carries no loss, an unmasked one does, whether at the start, at the end or in between."""
    loss = readable(subject, mask=True)
    skipped = set(loss.dropped if subject.declared("skip") is None else range(subject.declared("skip")))
    for mask in masks(loss.places):
        reading = read(loss, loss.symbols, loss.V, places=loss.places, mask=mask)
        for row, (kept, found) in enumerate(zip(mask, reading.used, strict=True)):
            asked = {t for t in range(loss.places) if not kept[t]} | skipped
            dropped = {t for t in range(loss.places) if not found[t]}
            if asked != dropped:
                others = [{t for t in range(loss.places) if not other[t]} | skipped for other in mask]
                why, likely = misread_mask(asked, dropped, loss.places)
                if dropped in others:
                    why, likely = f"that is row {others.index(dropped)}'s mask", ("loss-mask-of-row-0",)
                fail(
                    f"row {row}: drops {named(dropped)}; asked for {spans(asked) or 'none'}: {why}",
                    likely=likely,
                    advice="The mask says which targets count: mask[b, t] belongs to targets[b, t], True keeps it. "
                    "A parameter named pad_mask or ignore_mask is read the other way round.",
                    asked=sorted(asked),
                    dropped=sorted(dropped),
                )
        refuse_strays(reading, 0, "under a mask ")


@needs(UNDERSTOOD)
def check_every_symbol_counts_as_target(subject: Subject) -> None:
    """A target carries loss whatever its token id is."""
    loss = readable(subject)
    note(symbols_tried=len(loss.symbols) + len(loss.left_out))
    if not loss.left_out:
        return
    ids = spans(loss.left_out)
    says = f"a target of token id {ids} carries no loss, though nothing masks it"
    spoken = spoken_ids(subject) & set(loss.left_out)
    if spoken:
        fail(
            f"{says}, and by the subject's tokenizer {spans(spoken)} stands in {SENTENCE!r}: it is never learned",
            likely=("pad-id-collides-with-real-token",),
            advice="Mask by position, not by token id; or reserve an id that no text has.",
            ids=sorted(spoken),
        )
    if "pad" not in (subject.part("declares") or {}):
        advise(f"{says}: right only if {ids} is padding and nothing else, neither a character nor an end token")
        return
    if loss.left_out != (subject.declared("pad"),):
        fail(
            f"{says}: it is never learned",
            likely=("pad-id-collides-with-real-token",),
            advice="Mask by position, not by token id; or reserve an id that no text has.",
            ids=list(loss.left_out),
        )


@needs(UNDERSTOOD)
def check_loss_leaves_its_inputs_alone(subject: Subject) -> None:
    """Logits, targets, mask and random state are the same after the call, and the same call gives the same."""
    loss = met_loss(subject)
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask = masks(loss.places)[0] if loss.masks else None
    given = [("logits", logits), ("targets", targets)] + ([] if mask is None else [("mask", mask)])
    before, state = [x.clone() for _, x in given], torch.get_rng_state()
    first = loss(logits, targets, mask).detach()
    for (name, now), then in zip(given, before, strict=True):
        expect_same(
            now, then, axes=("row", "position", "symbol"), likely=("labels-alias-input-ids",),
            says=f"the loss writes into its {name}, which the caller still uses (they may be the model's own input)",
            advice="Clone before an in-place change: labels = labels.clone(); or use masked_fill, which copies.",
        )  # fmt: skip
    if loss.inside_model:
        return  # what a model draws is not its loss's doing
    if not torch.equal(state, torch.get_rng_state()):
        fail("the loss draws random numbers", advice="A loss has nothing to draw.")
    expect_same(
        loss(logits, targets, mask).detach(), first, axes=(), says="the same call gives another loss",
        advice="Look for what outlives a call: a running mean, a global, an argument changed in place.",
    )  # fmt: skip


SENTENCE = "I love machine learning"


def spoken_ids(subject: Subject) -> set[int]:
    """The ids of the homework's sentence by the subject's own tokenizer; none where it has none that can be asked."""
    encode = getattr(subject.part("tokenizer"), "encode", None)
    try:
        return {int(i) for i in encode(SENTENCE)} if encode else set()
    except Exception:
        return set()


@needs(UNDERSTOOD, DROPPED, MASK, PURE)
@drawn(case=draw_case, when=lambda subject: closed_form(subject))
def check_value_is_the_closed_form(subject: Subject, case: Any) -> None:
    """The loss is the reduction of log Σ exp(logits) - logit[target] over the unmasked targets, however ragged."""
    loss, (logits, targets, mask) = met_loss(subject), problem(met_loss(subject), case)
    weights = weights_of(subject, loss, mask)
    want = (weights * cross_entropy(logits, targets, loss.smoothing)).sum()
    got = loss(logits, targets, given(loss, mask)).detach().double()
    bound, largest = precision(loss), max(1.0, float(want.abs()))
    if abs(float(got - want)) > bound.size * largest:
        why, likely = cause(subject, loss)
        fail(
            f"the loss of a batch with {int(all_kept(loss, mask).sum())} of {mask.numel()} targets unmasked is "
            f"{float(got):.6g}; by its formula, the {reduction(subject, loss)}, {float(want):.6g}. {why}",
            likely=likely,
            advice="Another reduction that is meant can be declared: declares = {'reduction': 'sum'}.",
            kept=mask.int().tolist(),
            got=float(got),
            want=float(want),
            bound=bound.size,
        )


@needs(VALUE)
@drawn(case=draw_case, examples=10, when=lambda subject: closed_form(subject))
def check_gradient_is_the_closed_form(subject: Subject, case: Any) -> None:
    """The gradient is weight × (softmax - one-hot of the target): exactly 0 where masked."""
    loss, (logits, targets, mask) = met_loss(subject), problem(met_loss(subject), case)
    weights = weights_of(subject, loss, mask)
    want = expected_gradient(logits, targets, weights, loss.smoothing)
    got = gradient(loss, logits, targets, given(loss, mask))
    scale = float(weights.max())
    if (got - want).abs().max() > precision(loss).size * scale:
        why, likely = cause(subject, loss)
        expect_close(
            got / scale, want / scale, bound=precision(loss), axes=PLACE, likely=likely,
            says=f"the gradient is not weight × (softmax - one-hot of the target). {why}",
            advice="Compare with F.cross_entropy on logits without a detach, a softmax or a clamp before it.",
        )  # fmt: skip
    masked = got[~all_kept(loss, mask)]
    expect_same(
        masked, torch.zeros_like(masked), axes=("masked target", "symbol"), likely=("loss-mask-ignored",),
        says="a masked target is trained: its gradient is not exactly 0",
        advice="Multiply the loss of each target by its mask before the sum, or set masked targets to ignore_index.",
    )  # fmt: skip


@needs(VALUE)
def check_padding_changes_nothing(subject: Subject) -> None:
    """How many masked targets stand beside the others, and what they are, changes neither loss nor gradient."""
    loss = readable(subject, mask=True)
    closed_form(subject)
    logits, targets = sample(loss, rows=2, places=loss.places)
    long = loss.places - 2
    mask = torch.arange(loss.places) < torch.tensor([[long], [long - 2]])
    short = loss(logits[:, :long], targets[:, :long], mask[:, :long]).detach()
    padded = loss(logits, targets, mask).detach()
    if not torch.isclose(short, padded, rtol=precision(loss).size):
        share = float(padded / short)
        fail(
            f"two columns of padding change the loss from {short:.6g} to {padded:.6g} (× {share:.4g}; {long} of "
            f"{loss.places} columns are real)",
            likely=("masked-mean-over-all-positions", "masked-logits-zeroed", "padding-counted"),
            advice="Divide by the number of unmasked targets, mask.sum(), not by all positions.",
        )
    other = loss(logits.masked_fill(~mask[..., None], 3.0), targets.masked_fill(~mask, int(loss.symbols[0])), mask)
    says = "the content of masked places changes the loss"
    expect_same(
        other.detach(), padded, says=says, axes=(), likely=("masked-numerator-unmasked",),
        advice="The sum needs the mask as the count does: (losses * mask).sum() / mask.sum().",
    )  # fmt: skip


@needs(VALUE)
def check_a_batch_given_twice_counts_as_declared(subject: Subject) -> None:
    """Every row given twice leaves a mean as it is and doubles a sum."""
    loss = readable(subject)
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask = masks(loss.places)[1] if loss.masks else None
    twice = None if mask is None else mask.repeat(2, 1)
    once, both = loss(logits, targets, mask), loss(logits.repeat(2, 1, 1), targets.repeat(2, 1), twice)
    factor = 2.0 if reduction(subject, loss) in ("sum", USUAL[2]) else 1.0
    if abs(float(both / once) - factor) > 1e-5:
        fail(
            f"every row given twice makes the loss {float(both / once):.6g} times as large; by its reduction "
            f"({reduction(subject, loss)}) it should be {factor:g} times",
            likely=("loss-divided-by-one-less",),
            advice="Divide by the number of unmasked targets themselves.",
        )


@needs(VALUE)
def check_known_logits_give_known_losses(subject: Subject) -> None:
    """Certainty of the target gives 0, of the token before it much more, and no opinion ln V."""
    loss = met_loss(subject)
    closed_form(subject)
    if subject.declared("called") is None and (loss.reading is None or loss.smoothing or loss.inside_model):
        raise NotApplicable("label smoothing, or what a model adds to its loss, moves these values")
    V = loss.V
    targets = loss.symbols[torch.arange(2 * loss.places).view(2, -1) * 3 % len(loss.symbols)]
    one_hot = torch.nn.functional.one_hot(targets, V).double()
    mask = torch.ones_like(targets, dtype=torch.bool) if loss.masks else None
    share = 1.0 / float(weights_of(subject, loss, torch.ones_like(targets).bool()).sum())
    known, unsure = (float(loss(x, targets, mask)) * share for x in (60 * one_hot, 0 * one_hot))
    copied = float(loss(60 * one_hot.roll(1, dims=1), targets, mask)) * share
    if known > 1e-6 or copied < 10:
        fail(
            f"logits sure of the right target give a loss of {known:.4g} (should be 0), logits sure of the target "
            f"before it {copied:.4g} (should be near 60)",
            likely=("label-shift-missing", "log-plus-eps", "masked-logits-zeroed", "softmax-twice"),
            advice="Compare the targets with what the logits at their position predict.",
        )
    ln_v = torch.tensor(V, dtype=torch.float64).log().item()
    if abs(unsure - ln_v) > 1e-5 * ln_v:
        fail(
            f"logits without an opinion give a loss of {unsure:.6g}; over {V} symbols it is ln {V} = {ln_v:.6g}",
            likely=("log-plus-eps", "loss-in-bits"),
            advice="The natural logarithm of the softmax, nothing added inside it.",
        )


@needs(VALUE)
def check_extreme_logits_stay_finite(subject: Subject) -> None:
    """Logits of 1e3 to 1e4, in float32 too, give the loss that the formula gives, and a finite gradient."""
    loss = readable(subject)
    closed_form(subject)
    if loss.domain != "logits" or loss.inside_model:
        raise NotApplicable("the softmax is not this loss's own", takes=loss.domain)
    for dtype in (torch.float64, torch.float32):
        for size in (1e3, 1e4):
            logits, targets = sample(loss, rows=2, places=loss.places)
            logits = (logits / logits.abs().max() * size).to(dtype)
            weights = weights_of(subject, loss, torch.ones_like(targets).bool())
            want = float((weights * cross_entropy(logits, targets, loss.smoothing)).sum())
            got, grad = float(loss(logits, targets, None)), gradient(loss, logits, targets, None)
            if not abs(got - want) <= 1e-5 * want or not grad.isfinite().all():
                fail(
                    f"logits up to {size:g} in {str(dtype).removeprefix('torch.')} give a loss of {got:.6g} instead of "
                    f"{want:.6g}"
                    + ("" if grad.isfinite().all() else ", and a gradient that is not finite")
                    + (": the softmax underflows before its logarithm is taken" if got != got or got > want else ""),
                    likely=("naive-log-of-softmax", "log-plus-eps"),
                    advice="Use log_softmax or cross_entropy: they subtract the largest logit first.",
                )


@needs(UNDERSTOOD, MASK)
def check_masked_logits_may_be_anything(subject: Subject) -> None:
    """Logits that are NaN or infinite where masked reach neither the loss nor the gradient."""
    loss = readable(subject, mask=True)
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask = masks(loss.places)[1]
    want = float(loss(logits, targets, mask))
    for name, value in (("NaN", torch.nan), ("infinite", torch.inf)):
        spoiled = logits.masked_fill(~mask[..., None], value)
        got, grad = float(loss(spoiled, targets, mask)), gradient(loss, spoiled, targets, mask)
        if abs(got - want) <= 1e-9 * abs(want) and grad.isfinite().all():
            continue
        what = f"the loss {got:.4g} instead of {want:.4g}" if got != want else "the gradient not finite"
        says = f"{name} logits at masked places make {what}: NaN times a mask of 0 is NaN"
        if subject.declared("empty") is None:
            advise(f"{says}; harmless as long as the model gives finite logits at padding")
            return
        fail(says, likely=("nan-times-zero-mask",), advice="Select with torch.where or masked_fill before the softmax.")


@needs(UNDERSTOOD)
def check_nothing_to_learn_is_no_loss(subject: Subject) -> None:
    """A batch whose targets are all masked gives a finite loss, 0 where declared, and no gradient."""
    loss = readable(subject, mask=True)
    logits, targets = sample(loss, rows=2, places=loss.places)
    mask, want = torch.zeros_like(targets, dtype=torch.bool), subject.declared("empty")
    value, grad = float(loss(logits, targets, mask)), gradient(loss, logits, targets, mask)
    if value == (want or 0.0) and grad.isfinite().all() and not grad.any():
        return
    state = "0" if not grad.any() else "not 0" if grad.isfinite().all() else "NaN"
    says = (
        f"with every target masked the loss is {value:.4g}, its gradient {state}: "
        + {
            "0": "that number spoils every mean that it enters",
            "not 0": "one such batch moves the weights for nothing",
            "NaN": "one such batch spoils every weight",
        }[state]
    )
    if want is None:
        advise(f"{says}, if it comes (PyTorch's own mean does the same)")
        return
    fail(says, likely=("all-masked-batch-nan",), advice="Divide by mask.sum().clamp(min=1).")


@needs(VALUE)
def check_low_precision_logits_keep_the_loss(subject: Subject) -> None:
    """The loss of bfloat16 logits is that of the same numbers in float64, or as near as PyTorch's own comes."""
    loss = readable(subject)
    closed_form(subject)
    if loss.domain != "logits" or loss.inside_model:
        raise NotApplicable("the softmax is not this loss's own", takes=loss.domain)
    logits, targets = sample(loss, rows=96, places=loss.places)
    logits = (3 * logits).bfloat16()
    everything = torch.ones_like(targets).bool()
    weights = weights_of(subject, loss, everything)
    want = float((weights * cross_entropy(logits, targets, loss.smoothing)).sum())
    try:
        got = float(loss(logits, targets, everything if loss.masks == "argument" else None))
    except RuntimeError as error:
        raise NotApplicable("the loss takes no bfloat16 logits", error=str(error).splitlines()[0]) from None
    plain = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    usual = abs(plain / float(cross_entropy(logits, targets).mean()) - 1)
    off, allowed = abs(got / want - 1), 1e-4 if subject.declared("float32") else 4 * usual + 2e-2
    note(relative_error=off, of_pytorch=usual, allowed=allowed)
    if not off <= allowed:
        fail(
            f"of bfloat16 logits the loss is {got:.6g} instead of {want:.6g}, {off:.1e} off (allowed {allowed:.1e}): "
            "it is computed in bfloat16, whose numbers near it are 1/256 apart, or its counts stop at 256",
            likely=("loss-in-bf16",),
            advice="Begin the loss with logits.float().",
        )
    if off > 1e-3:
        advise(f"the loss of bfloat16 logits is {off:.1e} off: logits.float() first would keep it exact")


@needs(UNDERSTOOD)
def check_loss_takes_what_the_model_gives(subject: Subject) -> None:
    """A loss of log-probabilities is given log-probabilities, and a loss of logits is not given probabilities."""
    if not subject.brings("loss") and (line := cross_entropy_line(subject)) and gives(subject) == "probabilities":
        fail(
            f"the model gives probabilities, and {line.module} takes logits: the softmax is made twice",
            where=line,
            likely=("softmax-twice",),
            advice="return the head's outputs without a softmax: cross_entropy makes it",
        )
    loss = met_loss(subject)
    if loss.inside_model:
        raise NotApplicable("the model computes its loss itself")
    given = gives(subject)
    note(model_gives=given, loss_takes=loss.domain)
    if given != loss.domain and (given, loss.domain) != ("log-probabilities", "logits"):
        fail(
            f"the model gives {given}, the loss takes {loss.domain}: "
            + ("the softmax is made twice" if loss.domain == "logits" else "the softmax is never made"),
            likely=("softmax-twice",) if loss.domain == "logits" else ("nll-of-raw-logits",),
            advice="cross_entropy takes raw logits; nll_loss takes log_softmax(logits).",
        )
