"""What a foreign train_step did, and by which mistake: from the direction and size of its update, and its calls."""

from __future__ import annotations

import inspect
import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, advise, fail, note
from ..loss.formula import cross_entropy
from ..subject import Subject, torch_seeded
from .explained import (
    angle,
    cause,
    clipped,
    clipping_mistakes,
    decays,
    exchanged_rows,
    near,
    pairings,
    parallel,
    row_weights,
    shares,
    step_mistakes,
    uneven_rows,
)
from .met_step import RATE, SURE, MetStep, equal_examples, met_step
from .runs import Example, Losses, Step, Ticks, examples, model_of, pieces, watched_events, write

EXACT = 1e-6  # relative, of updates in float64; clipping adds 1e-6 to the norm that it divides by
UNDECIDED = 0.7  # cosine above which an unknown update may come from an auxiliary loss
CLIP_ADVICE = "Call clip_grad_norm_(all parameters, c) after the last backward() and before optimizer.step()."


def refuse_update(
    got: Tensor, want: Tensor, when: str, says: str, likely: tuple[str, ...], model: nn.Module | None = None
) -> NoReturn:
    off = float((got - want).norm() / want.norm())
    if not says and model is not None:
        says = where_off(model, got, want)
    fail(
        f"{when}: the update is not the gradient of the mean loss over the targets (relative error {off:.2g}, angle "
        f"{angle(got, want)}°)" + (f"; it is {says}" if says else ""),
        likely=likely,
        advice="Keep this order: zero_grad, forward, backward (divided once by all targets of the batch), clip, step.",
        off=off,
        bound=EXACT,
    )


def where_off(model: nn.Module, got: Tensor, want: Tensor) -> str:
    """The parameters whose updates are wrong, if the others are right."""
    wanted = pieces(model, want)
    wrong = [n for n, piece in pieces(model, got).items() if wanted[n].any() and parallel(piece, wanted[n]) < SURE]
    if not wrong or len(wrong) > 0.7 * len(wanted):
        return ""
    named = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return f"right for {len(wanted) - len(wrong)} of {len(wanted)} parameters, but wrong for {named}"


def at(model: nn.Module, step: Step, what: Any) -> Any:
    """`what(examples)` at the weights before a step; the weights are restored afterwards."""
    write(model, step.before)
    try:
        return what(step.examples)
    finally:
        write(model, step.after)


def follow_with_train_step(subject: Subject) -> None:
    """Judges two steps of plain SGD on batches of rows of equal length."""
    met = met_step(subject)
    note(called=met.says, update_per_gradient=met.factor, calls_per_step=met.calls)
    model, rows = model_of(subject).to(met.dtype), len(met.first.examples)
    batches = [met.first.examples, equal_examples(subject, rows, seed=2)]
    write(model, met.first.before)
    losses = Losses(subject, model)
    gradient = losses.mean(batches[0])[0]
    if not met.right:
        other_direction(subject, model, met, gradient, batches[0])
        return
    judge_calls(subject, met)
    judge_length(met, sum(len(e) - 1 for e in batches[0]), rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = [met.run(model, optimizer, batch) for batch in batches]
    second = at(model, steps[1], losses.mean)[0]
    got = -steps[1].update / RATE
    if parallel(got, second) < SURE - 1e-3:
        found = cause(got / met.factor, step_mistakes(got / met.factor, second, [gradient], 1, 3))
        refuse_update(got, second, "step 2", *found, model=model)


def judge_calls(subject: Subject, met: MetStep) -> None:
    """The optimizer passed in must be stepped, and once per gradient."""
    model = model_of(subject).to(met.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with watched_events(model, optimizer) as events:
        step = met.run(model, optimizer, met.first.examples)
    found = events.gradients
    note(order=str(events))
    if not found and step.update.any():
        fail(
            "the weights change, but the optimizer passed to train_step is never stepped: another optimizer is used, "
            "without the learning rate, moment estimates and parameter groups of this one",
            likely=("step-by-another-optimizer",),
            advice="Call step() on the optimizer that is passed to train_step.",
            order=events.names,
        )
    again = [i for i in range(1, len(found)) if torch.equal(found[i], found[i - 1])]
    if again:
        fail(
            f"optimizer.step() is called {len(found)} times, {len(again) + 1} of them on the same gradient ({events})",
            likely=("optimizer-steps-twice",),
            advice="Call optimizer.step() once, after the last backward() of a batch.",
            order=events.names,
        )


def judge_length(met: MetStep, targets: int, rows: int) -> None:
    """The size of an update in the right direction: a loss sum may be meant, twice the gradient hardly."""
    factor = met.factor
    if math.isclose(factor, 1.0, rel_tol=1e-4):
        return
    whole = next((n for n in range(2, rows) if math.isclose(factor, n, rel_tol=1e-6)), None)
    mean = met.first.loss is not None and met.first.loss > 0
    if met.dtype == torch.float64 and whole and mean:
        fail(
            f"the update is {whole} times the gradient of the mean loss ({rows} rows, {targets} targets), as if the "
            f"losses of {whole} micro-batches were added without a division, or backward() were called {whole} times",
            likely=("accum-no-division",),
            advice="Divide once, by the number of all targets of the batch.",
            factor=factor,
        )
    if met.dtype == torch.float64 and math.isclose(factor, 1 / rows, rel_tol=1e-6):
        fail(
            f"the update is the gradient of the mean loss divided once more, by the {rows} rows of the batch",
            likely=("accum-double-normalised",),
            advice="Remove one division: the mean is already divided by the number of targets.",
            factor=factor,
        )
    size = "the sum over the targets" if math.isclose(factor, targets, rel_tol=1e-4) else "clipped or scaled"
    advise(f"the update is {factor:.4g} times the gradient of the mean loss: {size}")


def other_direction(subject: Subject, model: nn.Module, met: MetStep, gradient: Tensor, batch: list[Example]) -> None:
    """Judges an update that is not in the direction of the gradient."""
    got, when = -met.first.update / RATE, f"the first step ({met.says})"
    if not got.any():
        refuse_update(got, gradient, "the first step", *cause(got, step_mistakes(got, gradient, [], 1, 1)))
    refuse_pairing(subject, model, met, got, gradient, batch)
    refuse_rows(subject, model, got, gradient, batch, when)
    advise_of_several_steps(subject, met)
    split = [p for p in pieces(model, got).items() if p[1].any()]
    wanted = pieces(model, gradient)
    if all(parallel(piece, wanted[name]) > SURE for name, piece in split):
        advise("each parameter's gradient is clipped separately, which changes the direction of the update")
        return
    limit = float(got.abs().max())
    if near(got, gradient.clamp(-limit, limit)):
        advise(f"gradients are clipped value by value, at {limit:.3g}, which changes the direction of the update")
        return
    if near(got, gradient.clamp(max=float(got.max()))) or near(got, gradient.clamp(min=float(got.min()))):
        says = "clipped value by value on one side only: entries of the other sign are not clipped"
        refuse_update(got, gradient, when, says, ("clip-by-value",))
    shrunk = decays(pieces(model, got), wanted, pieces(model, met.first.before))
    if shrunk:
        advise(f"besides the gradient, the step applies weight decay to {len(shrunk)} parameters")
        return
    says, likely = cause(got, step_mistakes(got, gradient, [], sum(len(e) - 1 for e in batch), len(batch)))
    if not says and parallel(got, gradient) > UNDECIDED:
        advise(f"the update is {angle(got, gradient)}° from the gradient of the mean next-token loss")
        raise NotApplicable("the step adds an unknown term to the next-token loss", called=met.says)
    refuse_update(got, gradient, when, says, likely, model)


def advise_of_several_steps(subject: Subject, met: MetStep) -> None:
    model, optimizer = fresh(subject, met)
    with watched_events(model, optimizer) as events:
        met.run(model, optimizer, met.first.examples)
    if len(events.gradients) > met.calls:
        advise(
            f"optimizer.step() is called {len(events.gradients)} times in one train_step ({events}): every micro-batch "
            "makes its own step, so nothing is accumulated"
        )


def refuse_rows(
    subject: Subject, model: nn.Module, got: Tensor, gradient: Tensor, batch: list[Example], when: str
) -> None:
    """Fails if rows have unequal weights, or are trained on each other's targets."""
    whole = torch.tensor(batch, device=subject.device)
    losses, logits = Losses(subject, model), subject.logits(model, whole[:, :-1])
    counts = row_weights(got, [losses.gradient(row.mean() / len(batch)) for row in cross_entropy(logits, whole[:, 1:])])
    if counts is not None and (max(counts) - min(counts)) > 1e-3 * max(map(abs, counts)):
        refuse_update(got, gradient, when, *uneven_rows(counts))
    crossed = [[losses.gradient(cross_entropy(x, y).mean()) for y in whole[:, 1:]] for x in logits]
    says = exchanged_rows(got, crossed)
    if says:
        refuse_update(got, gradient, when, says, ("step-pairs-other-rows",))


def refuse_pairing(
    subject: Subject, model: nn.Module, met: MetStep, got: Tensor, gradient: Tensor, batch: list[Example]
) -> None:
    """Fails if the update is the gradient for other targets."""
    whole = torch.tensor(batch, device=subject.device)
    tokens, targets = whole[:, :-1], whole[:, 1:]
    losses = Losses(subject, model)
    for says, likely, logits, labels in pairings(subject.logits(model, tokens), tokens, targets):
        wrong = losses.gradient(cross_entropy(logits, labels).mean())
        if parallel(got, wrong) > SURE - 1e-4:
            refuse_update(got, gradient, f"the first step ({met.says})", says, likely)
    chosen = policy(losses, got, subject.logits(model, tokens), targets)
    if chosen:
        advise(f"the loss of this step {chosen}")
        raise NotApplicable(f"the loss of this step {chosen}", called=met.says)


def policy(losses: Losses, got: Tensor, logits: Tensor, targets: Tensor) -> str:
    """The legitimate choice that explains an update: some targets are left out, or label smoothing."""
    values = cross_entropy(logits, targets)
    for n in (1, 2, 3):
        if n < targets.shape[1] - 1 and parallel(got, losses.gradient(values[:, n:].mean())) > SURE - 1e-4:
            return f"leaves out the first {n} targets of every row"
    for symbol in sorted({int(i) for i in targets.flatten()}):
        if parallel(got, losses.gradient(values[targets != symbol].mean())) > SURE - 1e-4:
            return f"leaves out targets with id {symbol}: correct if that is only padding"
    plain, even = losses.gradient(values.mean()), losses.gradient(-logits.log_softmax(-1).mean())
    a, b = shares(got, plain, even)
    if a > 0 and 0 < b < a and parallel(got, a * plain + b * even) > SURE - 1e-4:
        return f"uses label smoothing of {b / (a + b):.3g}"
    return ""


# What a step does with padding, a clipping limit, a loss scale and a schedule


ROLE_NAMES = {"clip": "a clipping limit", "scaler": "a gradient scaler", "scheduler": "a learning-rate scheduler"}


def understood(subject: Subject, role: str = "") -> MetStep:
    """A step in the direction of the gradient, with a parameter for the role. Raises NotApplicable for others."""
    met = met_step(subject)
    if role and met.takes(role) is None:
        raise NotApplicable(f"train_step has no parameter for {ROLE_NAMES.get(role, role)}", parameters=list(met.roles))
    if not met.right:
        raise NotApplicable("the update is not in the direction of the next-token gradient", called=met.says)
    return met


def fresh(subject: Subject, met: MetStep) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model_of(subject).to(met.dtype)
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def padded_rows_count_by_their_targets(subject: Subject) -> None:
    """In rows of different lengths padded with targets of -100, every real target must have the same weight."""
    met = understood(subject)
    model, optimizer = fresh(subject, met)
    batch = examples(subject, len(met.first.examples), seed=2, longest=subject.sizes.block_size - 1)
    losses = Losses(subject, model)
    parts = [losses.of(example) for example in batch]
    total, counts = torch.stack([g for g, _, _ in parts]).sum(0), [n for _, _, n in parts]
    try:
        step = met.run(model, optimizer, batch)
    except Exception as error:
        raise NotApplicable("train_step takes no padded batch with targets of -100", error=str(error)[:100]) from None
    got = -step.update / RATE
    if parallel(got, total) > SURE - 1e-4:
        return
    found = row_weights(got, [g for g, _, _ in parts])
    if found is None:
        note(padding="counts, or is not marked by -100")
        raise NotApplicable("the step does not ignore targets of -100, and its own padding id is unknown")
    per_row = [c * n for c, n in zip(found, counts, strict=True)]
    if max(per_row) - min(per_row) < 1e-3 * max(map(abs, per_row)):
        advise("the step averages each row first: targets in short rows count more")
        return
    each = ", ".join(f"{c / max(found):.3g}" for c in found)
    if not knows_padding(met):
        advise(
            "the step averages the means of its micro-batches: correct only without padding (for rows of "
            f"{counts} targets, a target weighs {each}, row by row)"
        )
        return
    fail(
        f"in a padded batch whose rows have {counts} targets, a target weighs {each}, row by row: each micro-batch is "
        "divided by its own number of targets, so one with few targets weighs as much as one with many",
        likely=("accum-mean-of-means",),
        advice="Add up loss sums over the micro-batches, and divide once by the number of all targets of the batch.",
        targets=counts,
        weights=found,
    )


def knows_padding(met: MetStep) -> bool:
    """Whether a step is written for padded batches: it takes a mask, or its source mentions one."""
    try:
        source = inspect.getsource(met.function)
    except (OSError, TypeError):
        source = ""
    return bool(met.takes("mask")) or any(word in source for word in ("mask", "ignore_index", "-100", "pad"))


def limit_cuts_the_gradient(subject: Subject) -> None:
    """The clipping limit passed to the step must be the norm of its update, divided by the learning rate."""
    met = understood(subject, "clip")
    parameter = met.takes("clip")
    for share in (0.01, 0.5):
        model, optimizer = fresh(subject, met)
        gradient = met.factor * Losses(subject, model).mean(met.first.examples)[0]
        limit = share * float(gradient.norm())
        with watched_events(model, optimizer) as events:
            step = met.run(model, optimizer, met.first.examples, clip=limit)
        got, want = -step.update / RATE, clipped(gradient, limit)
        if near(got, want, 1e-4):
            continue
        targets = sum(len(example) - 1 for example in met.first.examples)
        says, likely = cause(got, clipping_mistakes(gradient, list(pieces(model, gradient).values()), limit, targets))
        if likely in (("clip-by-value",), ("clip-per-parameter",)) or not says:
            advise(f"with {parameter}={limit:.3g} the gradient is {says or 'changed in an unknown way'}")
            return
        left = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        if left and "clip-after-step" in likely and near(torch.cat(left).double(), want, 1e-3):
            says, likely = "clipped only after the step", ("clip-after-step",)
        fail(
            f"with {parameter}={limit:.3g}, a gradient of norm {float(gradient.norm()):.4g} gives an update of "
            f"{float(got.norm()):.4g} × the learning rate, expected {limit:.3g}: the gradient is {says}",
            likely=likely,
            advice=CLIP_ADVICE,
            limit=limit,
            order=events.names,
        )


def scaler_cancels(subject: Subject) -> None:
    """A clipped step must be the same with an enabled gradient scaler as with a disabled one."""
    met = understood(subject, "scaler")
    updates = []
    for enabled in (False, True):
        model = model_of(subject).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        gradient = Losses(subject, model).mean(met.first.examples)[0]
        given = {"scaler": scaler} | ({"clip": 0.5 * float(gradient.norm())} if met.takes("clip") else {})
        try:
            updates.append(met.run(model, optimizer, met.first.examples, **given).update)
        except Exception as error:
            raise NotApplicable("train_step fails with an enabled scaler", error=str(error)[:100]) from None
    if near(updates[1], updates[0], 1e-3):
        return
    share = float(updates[1].norm() / updates[0].norm())
    fail(
        f"with a loss scale of 1024, the update is {share:.4g} times as large as without: "
        + ("the gradient is clipped while it is scaled" if share < 1 else "the scale is never removed"),
        likely=("clip-before-unscale",),
        advice="Call scaler.scale(loss).backward(), scaler.unscale_(optimizer), clip, scaler.step(optimizer), "
        "scaler.update().",
        share=share,
    )


def schedule_ticks_once(subject: Subject) -> None:
    """A scheduler passed to the step must be stepped once per optimizer step, after it."""
    met = understood(subject, "scheduler")
    model, optimizer = fresh(subject, met)
    with watched_events(model, optimizer) as events:
        for _ in range(2):
            met.run(model, optimizer, met.first.examples, scheduler=Ticks(optimizer, events))
    order = [name for name in events.names if name != "backward"]
    ticks, steps = order.count("scheduler.step"), order.count("optimizer.step")
    note(order=str(events))
    if ticks > steps:
        fail(
            f"the scheduler is stepped {ticks} times in {steps} optimizer steps ({events}): the schedule ends "
            f"{ticks / max(steps, 1):.3g} times too early",
            likely=("scheduler-per-microbatch",),
            advice="Call scheduler.step() once, right after optimizer.step().",
            order=events.names,
        )
    if ticks == 0:
        advise("train_step takes a scheduler but never steps it: correct only if its caller does")
        return
    if order[0] == "scheduler.step":
        fail(
            f"the scheduler is stepped before the optimizer ({events}): the first learning rate is skipped",
            likely=("scheduler-off-by-one",),
            advice="Call optimizer.step() first, then scheduler.step().",
            order=events.names,
        )


def step_leaves_random_states(subject: Subject) -> None:
    """A step may draw from the global random generator, but must not seed it."""
    met = met_step(subject)
    after = []
    for seed in (3, 4):
        model, optimizer = fresh(subject, met)
        with torch_seeded(seed):
            met.run(model, optimizer, met.first.examples)
            after.append(torch.get_rng_state())
    if torch.equal(*after):
        fail(
            "the random state after a step does not depend on the state before: train_step seeds the generator, so "
            "dropout drops the same units at every step",
            likely=("step-reseeds",),
            advice="Seed once, before training.",
        )
