"""Next-token loss under a loss mask: which targets count, with which weight, and what the gradient is.

Judged is the subject's own `loss`, else the loss that its model returns. loss/met_loss.py finds out how it is called
and what it does. A usual reduction or shift is no failure unless the subject declares another one.
"""

from __future__ import annotations

from itertools import product

import torch

from .expect import Bound, NotApplicable, advise, drawn, expect_close, expect_same, fail, needs, note
from .loss import cases
from .loss.cases import Case, mask_for, reduction, shown_apart
from .loss.explained import misread_mask, named, spans
from .loss.formula import USUAL, cross_entropy, expected_gradient
from .loss.ignored import ignored, refuse_trained
from .loss.met_loss import met_loss
from .loss.placing import (
    refuse_crossings,
    refuse_other_symbols,
    refuse_shift,
    refuse_strays,
    refuse_what_teaches_nothing,
    remark_on_an_unshifted_label,
)
from .loss.reading import NoGradient, gradient, read
from .loss.returned import answers, cross_entropy_line, described, gives, log_probabilities, untrained
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
    """Given targets, forward must return a loss: one number in all, per row or per target."""
    found = answers(subject)
    if found.losses:
        return
    if found.instead_of_a_loss is None:
        raise NotApplicable(f"forward takes {found.name}, but returns nothing meant as a loss", gives=list(found.given))
    key, value = found.instead_of_a_loss
    place = f" as output[{key}]" if key.isdigit() else f" as {key}" if key else ""
    fail(
        f"given {found.name}, forward returns {described(value)}{place} instead of a loss"
        f"{f'; without {found.name} it returns nothing there' if found.optional else ''}",
        where=locate(found.model, type(found.model).__name__),
        likely=("loss-never-computed", "loss-is-a-function"),
        advice="call the loss and return its result: "
        "F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))",
    )


@needs("check_contract.check_logits_have_shape")
def check_targets_leave_the_logits_as_they_are(subject: Subject) -> None:
    """The logits returned with targets must equal those returned without."""
    found = answers(subject)
    got, want = found.both_logits({subject.sizes.vocab_size, subject.width})
    where = locate(found.model, type(found.model).__name__)
    if got.shape[-1] != want.shape[-1]:
        fail(
            f"with {found.name} forward returns {list(got.shape)} in place of the logits {list(want.shape)} that it "
            f"returns without: {got.shape[-1]} numbers per position are not logits over {want.shape[-1]} tokens, and "
            "their loss does not train the head",
            where=where,
            likely=("loss-of-hidden-states",),
            advice="compute logits = head(x) before both the loss and the return",
        )
    last = want.dim() < 3 or want.shape[1] < got.shape[1]
    got, want = (x.reshape(len(x), -1, x.shape[-1])[:, -1:] if last else x for x in (got, want))
    expect_close(
        log_probabilities(got),
        log_probabilities(want),
        bound=Bound(1e-3 * spread(want), "1e-3 standard deviations of the logits"),
        axes=PLACE,
        where=lambda: where,
        likely=("loss-of-other-logits",),
        says=f"with {found.name} forward returns different logits{' for the last position' if last else ''} than "
        "without, so the model that is used is not the one that is trained",
        advice="compute the logits once for both cases; without targets, take the last position after the final norm",
    )


@needs(GIVES, "check_loss.check_targets_leave_the_logits_as_they_are")
def check_the_loss_trains_what_makes_the_logits(subject: Subject) -> None:
    """Every weight that the logits depend on must get a gradient from the loss that the model returns."""
    found = answers(subject)
    left = untrained(found)
    for batch in (1, 2):  # an expert may serve the last token alone, whose logits have no target
        left = [name for name in left if name in untrained(answers(subject, batch=batch))] if left else left
    if left:
        more = f" (nor are {len(left) - 1} more weights)" if len(left) > 1 else ""
        fail(
            f"the logits depend on {left[0]}, but the loss that forward returns with {found.name} has no gradient "
            f"there, so it is never trained{more}",
            where=locate(found.model, left[0].rpartition(".")[0] or type(found.model).__name__),
            likely=("loss-beside-the-head",),
            advice="compute the loss from the logits that are returned: no detach, no other tensor",
            weights=left,
        )


def check_a_place_is_trained_on_its_own_target(subject: Subject) -> None:
    """The logits at each position must be trained on one target of the same row, with the same shift everywhere."""
    try:
        loss = met_loss(subject)
    except NoGradient as error:
        fail(
            f"nothing can be learned from this loss: {error}",
            advice="return the loss as a tensor, without .item() or .detach()",
        )
    note(called=loss.says, takes=loss.domain, shift=loss.shift, masks=loss.masks, reduction=loss.reduction or "unknown")
    for other in loss.also_runs:
        advise(f"{other} can be called too, but gives no cross entropy; only {loss.says} does")
    reading = loss.reading
    if reading is None:
        refuse_what_teaches_nothing(loss, only=not loss.inside_model or len(answers(subject).losses) == 1)
        raise NotApplicable(cases.UNREADABLE, called=loss.says)
    refuse_other_symbols(loss)
    if reading.crossings:
        refuse_crossings(reading.source, reading.crossings)
    declared = subject.declared("shift")
    if loss.shift not in ((0, 1) if declared is None else (declared,)):
        refuse_shift(loss.shift, declared)
    refuse_strays(reading, loss.shift, "")
    remark_on_an_unshifted_label(subject, loss)


@needs(UNDERSTOOD)
def check_no_target_is_dropped(subject: Subject) -> None:
    """Without a mask every target of every row must carry loss, except those that your `declares` says to skip."""
    loss = cases.readable(subject)
    used = read(loss, loss.symbols, loss.V, places=loss.places).used
    places, skip = used.shape[1], subject.declared("skip")
    asked = loss.dropped if skip is None else tuple(range(skip))
    if loss.dropped and skip is None:
        advise(f"without a mask the loss drops {named(loss.dropped)} of every row, counted from 0")
    note(dropped=spans(loss.dropped))
    for row, kept in enumerate(used):
        dropped = tuple(t for t in range(places) if not kept[t])
        if dropped != asked:
            last = dropped == (*asked, places - 1)
            whole = "nothing of this row is trained" if not kept.any() else "the last target is never trained" * last
            fail(
                f"without a mask the loss drops {named(dropped)} of row {row} (of 0-{places - 1}), should drop "
                f"{named(asked)}" + f": {whole}" * bool(whole),
                likely=("last-target-dropped",) if last else (),
                advice="look for [:-1] or [1:] applied to the targets a second time, or for a mask one position short",
                dropped=list(dropped),
            )


@needs(UNDERSTOOD, DROPPED)
def check_mask_drops_its_targets_and_no_others(subject: Subject) -> None:
    """A masked target must carry no loss and an unmasked one must, at the start, at the end and in between."""
    loss = cases.readable(subject, mask=True)
    skipped = set(loss.dropped if subject.declared("skip") is None else range(subject.declared("skip")))
    for mask in cases.masks(loss.places):
        reading = read(loss, loss.symbols, loss.V, places=loss.places, mask=mask)
        for row, (kept, found) in enumerate(zip(mask, reading.used, strict=True)):
            asked = {t for t in range(loss.places) if not kept[t]} | skipped
            dropped = {t for t in range(loss.places) if not found[t]}
            if asked != dropped:
                others = [{t for t in range(loss.places) if not other[t]} | skipped for other in mask]
                why, likely = misread_mask(asked, dropped, loss.places, others)
                fail(
                    f"in row {row} the loss drops {named(dropped)}, should drop {named(asked)}: {why}",
                    likely=likely,
                    advice="apply mask[b, t] to targets[b, t], True to keep it (a parameter named pad_mask or "
                    "ignore_mask is given the opposite)",
                    asked=sorted(asked),
                    dropped=sorted(dropped),
                )
        refuse_strays(reading, 0, "under a mask ")


@needs(UNDERSTOOD)
def check_every_symbol_counts_as_target(subject: Subject) -> None:
    """A target must carry loss whatever its token id."""
    loss = cases.readable(subject)
    note(symbols_tried=len(loss.symbols) + len(loss.left_out))
    if not loss.left_out:
        return
    ids = spans(loss.left_out)
    says = f"targets of token id {ids} carry no loss, though nothing masks them"
    advice = "mask by position, not by token id, or reserve an id that no text uses"
    spoken = cases.sentence_ids(subject) & set(loss.left_out)
    if spoken:
        fail(
            f"{says}; your tokenizer uses {spans(spoken)} in {cases.SENTENCE!r}, so it is never learned",
            likely=("pad-id-collides-with-real-token",),
            advice=advice,
            ids=sorted(spoken),
        )
    if "pad" not in (subject.part("declares") or {}):
        advise(f"{says}: correct only if {ids} is used for padding alone, not for a character or an end token")
        return
    if loss.left_out != (subject.declared("pad"),):
        fail(
            f"{says}, so they are never learned",
            likely=("pad-id-collides-with-real-token",),
            advice=advice,
            ids=list(loss.left_out),
        )


@needs(UNDERSTOOD)
def check_loss_leaves_its_inputs_alone(subject: Subject) -> None:
    """The loss must not change its inputs or the random state, and must give the same value when called again."""
    loss = met_loss(subject)
    logits, targets = cases.sample(loss, rows=2, places=loss.places)
    mask = cases.masks(loss.places)[0] if loss.masks else None
    given = [("logits", logits), ("targets", targets)] + ([] if mask is None else [("mask", mask)])
    before, state = [x.clone() for _, x in given], torch.get_rng_state()
    first = loss(logits, targets, mask).detach()
    for (name, now), then in zip(given, before, strict=True):
        expect_same(
            now,
            then,
            axes=PLACE,
            likely=("labels-alias-input-ids",),
            says=f"the loss modifies its {name} in place, which the caller still uses, perhaps as the model's input",
            advice="clone before changing in place (labels = labels.clone()), or use masked_fill, which copies",
        )
    if loss.inside_model:
        return  # what a model draws is not its loss's doing
    if not torch.equal(state, torch.get_rng_state()):
        fail("the loss draws random numbers", advice="remove dropout or sampling from the loss")
    expect_same(
        loss(logits, targets, mask).detach(),
        first,
        axes=(),
        says="the loss gives two values for the same arguments",
        advice="look for state that outlives a call: a running mean, a global, an argument changed in place",
    )


@needs(UNDERSTOOD, DROPPED, MASK, PURE)
@drawn(case=cases.draw, when=cases.closed_form)
def check_value_is_the_closed_form(subject: Subject, case: Case) -> None:
    """The loss must be the reduction of log Σ exp(logits) - logit[target] over the unmasked targets of any batch."""
    loss, (logits, targets, mask) = met_loss(subject), cases.problem(met_loss(subject), case)
    weights = cases.weights_of(subject, loss, mask)
    want = (weights * cross_entropy(logits, targets, loss.smoothing)).sum()
    got = loss(logits, targets, mask_for(loss, mask)).detach().double()
    bound, largest = cases.precision(loss), max(1.0, float(want.abs()))
    if abs(float(got - want)) > bound.size * largest:
        why, likely = cases.cause(subject, loss)
        kept, (wrong, right) = int(cases.all_kept(loss, mask).sum()), shown_apart(float(got), float(want))
        fail(
            f"with {kept} of {mask.numel()} targets unmasked the loss is {wrong}, should be {right} "
            f"({reduction(subject, loss)})" + f": {why}" * bool(why),
            likely=likely,
            advice="compare with F.cross_entropy, or declare the reduction you mean: declares = {'reduction': 'sum'}",
            kept=mask.int().tolist(),
            got=float(got),
            want=float(want),
            bound=bound.size,
        )
    cases.remark_on_rows(subject, loss)


@needs(VALUE)
@drawn(case=cases.draw, examples=10, when=cases.closed_form)
def check_gradient_is_the_closed_form(subject: Subject, case: Case) -> None:
    """The gradient must be weight × (softmax - one-hot of the target)."""
    loss, (logits, targets, mask) = met_loss(subject), cases.problem(met_loss(subject), case)
    weights = cases.weights_of(subject, loss, mask)
    want = expected_gradient(logits, targets, weights, loss.smoothing)
    got = gradient(loss, logits, targets, mask_for(loss, mask))
    scale = float(weights.max())
    if (got - want).abs().max() > cases.precision(loss).size * scale:
        why, likely = cases.cause(subject, loss)
        expect_close(
            got / scale,
            want / scale,
            bound=cases.precision(loss),
            axes=PLACE,
            likely=likely,
            says="the gradient is not weight × (softmax - one-hot of the target)" + f" ({why})" * bool(why),
            advice="compare with F.cross_entropy of logits that no detach, softmax or clamp has changed",
        )


@needs(UNDERSTOOD, DROPPED, MASK)
def check_ignored_targets_are_not_trained(subject: Subject) -> None:
    """A target that is masked, or has a label that the loss accepts as ignored, must get a gradient of exactly 0."""
    loss = cases.readable(subject)
    try:
        tried = list(ignored(subject, loss))
    except Exception as error:
        raise NotApplicable(
            "the loss takes no mask, and crashes on the labels that are usually ignored",
            error=f"{type(error).__name__}: {error}",
        ) from None
    if not tried:
        raise NotApplicable("the loss takes no mask, and reads -100 and -1 as token ids counted from the end")
    note(labels=[one.label for one in tried])
    for one in tried:
        refuse_trained(one, loss)


@needs(VALUE)
def check_padding_changes_nothing(subject: Subject) -> None:
    """The loss must not depend on how many masked targets a batch has or what they are."""
    loss = cases.readable(subject, mask=True)
    cases.closed_form(subject)
    short, padded, other = cases.padded(loss)
    if not torch.isclose(short, padded, rtol=cases.precision(loss).size):
        before, after = shown_apart(float(short), float(padded))
        fail(
            f"adding two columns of padding to {loss.places - 2} real ones changes the loss from {before} to {after} "
            f"(× {float(padded / short):.4g})",
            likely=("masked-mean-over-all-positions", "masked-logits-zeroed", "padding-counted"),
            advice="divide by the number of unmasked targets, mask.sum(), not by that of all positions",
        )
    expect_same(
        other,
        padded,
        axes=(),
        likely=("masked-numerator-unmasked",),
        says="other logits and targets at masked positions change the loss",
        advice="apply the mask to the sum as well as to the count: (losses * mask).sum() / mask.sum()",
    )


@needs(VALUE)
def check_a_batch_given_twice_counts_as_declared(subject: Subject) -> None:
    """Repeating every row must leave a mean unchanged and double a sum."""
    loss = cases.readable(subject)
    logits, targets = cases.sample(loss, rows=2, places=loss.places)
    mask = cases.masks(loss.places)[1] if loss.masks else None
    twice = None if mask is None else mask.repeat(2, 1)
    once, both = loss(logits, targets, mask), loss(logits.repeat(2, 1, 1), targets.repeat(2, 1), twice)
    factor = 2.0 if reduction(subject, loss) in ("sum", USUAL[2]) else 1.0
    if abs(float(both / once) - factor) > 1e-5:
        got, want = shown_apart(float(both / once), factor)
        fail(
            f"repeating every row multiplies the loss by {got}, should be {want} ({reduction(subject, loss)})",
            likely=("loss-divided-by-one-less",),
            advice="divide by the number of unmasked targets, with nothing added or subtracted",
        )


@needs(VALUE)
def check_known_logits_give_known_losses(subject: Subject) -> None:
    """Logits certain of the target must give a loss of 0, of the previous target about 60, and equal logits ln V."""
    loss = met_loss(subject)
    cases.closed_form(subject)
    if subject.declared("called") is None and (loss.reading is None or loss.smoothing):
        raise NotApplicable("label smoothing changes these values")
    known, copied, equal = cases.known(subject, loss)
    if known > 1e-6 or copied < 10:
        fail(
            f"logits certain of the target give a loss of {known:.4g} (should be 0), logits certain of the target "
            f"before it {copied:.4g} (should be about 60)",
            likely=("label-shift-missing", "log-plus-eps", "masked-logits-zeroed", "softmax-twice"),
            advice="compare the logits at each position with the target of that position",
        )
    ln_v = torch.tensor(loss.V, dtype=torch.float64).log().item()
    if abs(equal - ln_v) > 1e-5 * ln_v:
        got, want = shown_apart(equal, ln_v)
        fail(
            f"equal logits give a loss of {got}, should be ln {loss.V} = {want}",
            likely=("log-plus-eps", "loss-in-bits"),
            advice="take the natural logarithm of the softmax, with nothing added inside it",
        )


@needs(VALUE)
def check_extreme_logits_stay_finite(subject: Subject) -> None:
    """Logits of 1e3 to 1e4 must give the right loss and a finite gradient, in float32 too."""
    loss = cases.readable(subject)
    cases.closed_form(subject)
    cases.needs_own_softmax(loss)
    for dtype, size in product((torch.float64, torch.float32), (1e3, 1e4)):
        got, want, grad = cases.extreme(subject, loss, size, dtype)
        if not abs(got - want) <= 1e-5 * want or not grad.isfinite().all():
            kind, (wrong, right) = str(dtype).removeprefix("torch."), shown_apart(got, want)
            fail(
                f"logits up to {size:g} in {kind} give a loss of {wrong}, should be {right}"
                + ("" if grad.isfinite().all() else ", and a gradient that is not finite")
                + (": the softmax underflows before its logarithm is taken" if got != got or got > want else ""),
                likely=("naive-log-of-softmax", "log-plus-eps"),
                advice="use log_softmax or cross_entropy, which subtract the largest logit first",
            )


@needs(UNDERSTOOD, MASK)
def check_masked_logits_may_be_anything(subject: Subject) -> None:
    """NaN or infinite logits at masked positions must affect neither the loss nor its gradient."""
    loss = cases.readable(subject, mask=True)
    logits, targets = cases.sample(loss, rows=2, places=loss.places)
    mask = cases.masks(loss.places)[1]
    want = float(loss(logits, targets, mask))
    for name, value in (("NaN", torch.nan), ("infinite", torch.inf)):
        spoiled = logits.masked_fill(~mask[..., None], value)
        got, grad = float(loss(spoiled, targets, mask)), gradient(loss, spoiled, targets, mask)
        if abs(got - want) <= 1e-9 * abs(want) and grad.isfinite().all():
            continue
        wrong, right = shown_apart(got, want)
        what = f"the loss {wrong}, should be {right}" if got != want else "the gradient NaN or infinite"
        says = f"{name} logits at masked positions make {what}: NaN times a mask of 0 is NaN"
        if subject.declared("empty") is None:
            advise(f"{says}; harmless as long as the model's logits at padding are finite")
            return
        fail(says, likely=("nan-times-zero-mask",), advice="select with torch.where or masked_fill before the softmax")


@needs(UNDERSTOOD)
def check_nothing_to_learn_is_no_loss(subject: Subject) -> None:
    """A batch whose targets are all masked must give a finite loss, 0 where declared, and a gradient of 0."""
    loss = cases.readable(subject, mask=True)
    logits, targets = cases.sample(loss, rows=2, places=loss.places)
    mask, want = torch.zeros_like(targets, dtype=torch.bool), subject.declared("empty")
    value, grad = float(loss(logits, targets, mask)), gradient(loss, logits, targets, mask)
    if value == (want or 0.0) and grad.isfinite().all() and not grad.any():
        return
    state = "0" if not grad.any() else "not 0" if grad.isfinite().all() else "nan"
    says = (
        f"with all targets masked the loss is {value:.4g} (gradient {state}); "
        + {
            "0": f"averaged with other batches it makes them {'nan' if value != value else 'wrong'}",
            "not 0": "such a batch changes the weights, though there is nothing to learn",
            "nan": "one step on such a batch makes the weights nan",
        }[state]
    )
    if want is None:
        advise(f"{says} (F.cross_entropy gives nan too)" if value != value else says)
        return
    fail(says, likely=("all-masked-batch-nan",), advice="divide by mask.sum().clamp(min=1)")


@needs(VALUE)
def check_low_precision_logits_keep_the_loss(subject: Subject) -> None:
    """The loss of bfloat16 logits must be about as close to the exact value as PyTorch's own cross entropy is."""
    loss = cases.readable(subject)
    cases.closed_form(subject)
    cases.needs_own_softmax(loss)
    got, want, usual = cases.in_bfloat16(subject, loss)
    off, allowed = abs(got / want - 1), 1e-4 if subject.declared("float32") else 4 * usual + 2e-2
    note(relative_error=off, of_pytorch=usual, allowed=allowed)
    if not off <= allowed:
        wrong, right = shown_apart(got, want)
        fail(
            f"for bfloat16 logits the loss is {wrong}, should be {right} (relative error {off:.1e}, allowed "
            f"{allowed:.1e}): it is computed in bfloat16, which rounds to 1 part in 256 and cannot count beyond 256",
            likely=("loss-in-bf16",),
            advice="start the loss with logits = logits.float()",
        )
    if off > 1e-3 and not loss.inside_model:  # autocast, under which a forward runs, casts its cross entropy
        advise(f"for bfloat16 logits the loss has a relative error of {off:.1e}; start it with logits.float()")


@needs(UNDERSTOOD)
def check_loss_takes_what_the_model_gives(subject: Subject) -> None:
    """The model must return what its loss expects: logits, or log-probabilities for a loss of log-probabilities."""
    if not subject.brings("loss") and (line := cross_entropy_line(subject)) and gives(subject) == "probabilities":
        fail(
            f"the model returns probabilities, but {line.module} expects logits: the softmax is applied twice",
            where=line,
            likely=("softmax-twice",),
            advice="return the output of the head without a softmax; cross_entropy applies it",
        )
    loss = met_loss(subject)
    returned = loss.gives or gives(subject)
    note(model_gives=returned, loss_takes=loss.domain)
    if returned != loss.domain and (returned, loss.domain) != ("log-probabilities", "logits"):
        twice = loss.domain == "logits"
        pair = "forward passes its loss" if loss.inside_model else "the model returns"
        fail(
            f"{pair} {returned}, but the loss expects {loss.domain}: the softmax is "
            + ("applied twice" if twice else "never applied"),
            where=locate(model := subject.build(), type(model).__name__) if loss.inside_model else None,
            likely=("softmax-twice",) if twice else ("nll-of-raw-logits",),
            advice="use cross_entropy for logits, or nll_loss for log_softmax(logits)",
        )
