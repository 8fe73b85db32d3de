"""Training: what one optimizer step does to the weights, compared with the gradients of its examples one by one.

A `Trainer`-like object is observed through its data and its objective, a plain `train_step` through its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .expect import CAUSAL, FOLLOWS, NotApplicable, advise, fail, needs, note
from .loss.met_loss import met_loss
from .probes.preconditions import expect_trainable
from .subject import Subject
from .training.explained import (
    Micro,
    accumulation_mistakes,
    cause,
    clipped,
    clipping_mistakes,
    near,
    off_in_direction,
    step_mistakes,
)
from .training.met_step import RATE, met_step
from .training.runs import Example, Losses, Step, TrainerRun, examples, model_of, pieces, write
from .training.steps import (
    CLIP_ADVICE,
    EXACT,
    at,
    follow_with_train_step,
    limit_cuts_the_gradient,
    padded_rows_count_by_their_targets,
    refuse_update,
    scaler_cancels,
)

STREAM_STEPS = 50
NO_LOSS = "the training step returns no loss"
OTHER_LOSS = "what the training step returns is not the mean next-token loss"


@needs(CAUSAL)
def check_a_step_follows_the_gradient(subject: Subject) -> None:
    """Each SGD step must change the weights by minus the learning rate times the gradient of the mean loss."""
    if not subject.brings("trainer"):
        follow_with_train_step(subject)
        return
    run = TrainerRun(subject, model_of(subject), examples(subject, 7), batch_size=3)
    earlier: list[Tensor] = []
    for number in range(1, 5):
        step = run.step()
        gradient, _ = at(run.model, step, Losses(subject, run.model).mean)
        got = -step.update / run.config.learning_rate
        if not near(got, gradient, EXACT):
            count, rows = sum(len(e) - 1 for e in step.examples), len(step.examples)
            when = f"step {number} ({rows} examples, {count} targets)"
            if number == 1 and near(-run.step().update / run.config.learning_rate, gradient, 1e-2):
                refuse_update(got, gradient, when, "zero, and the next step uses this gradient", STALE)
            refuse_update(got, gradient, when, *cause(got, step_mistakes(got, gradient, earlier, count, rows)))
        earlier.append(gradient)


STALE = ("step-with-stale-gradient",)


WINDOWS = ((5, 2, False), (5, 2, True), (4, 3, True), (6, 1, False))  # examples, micro-batch size, whether clipped


@needs(FOLLOWS)
def check_micro_batches_add_up_to_the_whole(subject: Subject) -> None:
    """Gradient accumulation must give the same update as the whole batch, even with uneven micro-batches."""
    if not subject.brings("trainer"):
        padded_rows_count_by_their_targets(subject)
        return
    for count, size, clips in WINDOWS:
        window = examples(subject, count, seed=size)
        model = model_of(subject)
        losses = Losses(subject, model)
        gradient = losses.mean(window)[0]
        limit = 0.5 * float(gradient.norm()) if clips else None
        run = TrainerRun(subject, model, window, batch_size=count, micro_batch_size=size, clip_norm=limit)
        step = run.step()
        got, want = -step.update / run.config.learning_rate, clipped(gradient, limit)
        if not near(got, want, EXACT):
            write(model, step.before)
            refuse_accumulation(losses, step, window, size, limit, got, want)


def refuse_accumulation(
    losses: Losses, step: Step, window: list[Example], size: int, limit: float | None, got: Tensor, want: Tensor
) -> None:
    seen = step.examples if len(step.examples) == len(window) else window
    sums = [losses.sums(seen[i : i + size]) for i in range(0, len(window), size)]
    targets = [n for _, _, n in sums]
    says, likely = cause(got, accumulation_mistakes([Micro(g, n) for g, _, n in sums], limit))
    if not says and len(step.examples) < len(window):
        says, likely = f"computed from {len(step.examples)} examples: the others are never read", LAST_DROPPED
    fail(
        f"{len(window)} examples in micro-batches of {size} (with {targets} targets"
        + (f", clipped at {limit:.3g}" if limit else "")
        + f") give an update of {float(got.norm()):.4g} × the learning rate, expected {float(want.norm()):.4g} (as for "
        f"the whole batch){off_in_direction(got, want)}" + (f": the update is {says}" if says else ""),
        likely=likely,
        advice="Accumulate the gradients of loss sums, and divide once by the number of targets of all micro-batches, "
        "before clipping.",
        targets=targets,
        clip_norm=limit,
        examples_read=len(step.examples),
    )


LAST_DROPPED = ("accum-partial-window-dropped",)


@needs(FOLLOWS)
def check_clipping_scales_the_whole_gradient(subject: Subject) -> None:
    """Clipping at c must scale the gradient of all parameters together by min(1, c / its norm), before the step."""
    if not subject.brings("trainer"):
        limit_cuts_the_gradient(subject)
        return
    declared = subject.declared("clip")
    window, model = examples(subject, 3), None
    for share in (0.01, 0.9, 1.1, 1e6):
        model = model_of(subject)
        losses = Losses(subject, model)
        gradient = losses.mean(window)[0]
        norm = float(gradient.norm())
        run = TrainerRun(subject, model, window, batch_size=3, clip_norm=share * norm)
        step = run.step()
        got, want = -step.update / run.config.learning_rate, clipped(gradient, share * norm)
        if near(got, want, 1e-4):
            continue
        targets = sum(len(example) - 1 for example in window)
        parts = list(pieces(model, gradient).values())
        says, likely = cause(got, clipping_mistakes(gradient, parts, share * norm, targets))
        if declared is None and likely in (("clip-by-value",), ("clip-per-parameter",)):
            advise(f"the gradient is {says}")
            return
        left = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        if left and "clip-after-step" in likely and near(torch.cat(left).double(), want, 1e-3):
            says, likely = "clipped only after the step", ("clip-after-step",)
        fail(
            f"a gradient of norm {norm:.4g}, clipped at {share * norm:.4g}, gives an update of "
            f"{float(got.norm()):.4g} × the learning rate, expected {float(want.norm()):.4g}"
            f"{off_in_direction(got, want)}" + (f": the gradient is {says}" if says else ""),
            likely=likely,
            advice=CLIP_ADVICE,
            limit=share * norm,
            length=norm,
        )


@needs(FOLLOWS)
def check_the_loss_scale_cancels(subject: Subject) -> None:
    """Loss scaling must cancel: with the loss and its count scaled alike, the clipped update must not change."""
    if not subject.brings("trainer"):
        scaler_cancels(subject)
        return
    window, updates = examples(subject, 3), []
    plain = None
    for scale in (1, 64):
        model = model_of(subject)
        plain = plain or TrainerRun(subject, model, window).trainer.objective

        def scaled(network: nn.Module, batch: Any, by: int = scale, objective: Any = plain) -> tuple[Tensor, Tensor]:
            total, count = objective(network, batch)
            return by * total, by * count

        limit = 0.5 * float(Losses(subject, model).mean(window)[0].norm())
        run = TrainerRun(subject, model, window, batch_size=3, clip_norm=limit, objective=scaled)
        updates.append(run.step().update)
    if not near(updates[1], updates[0], EXACT):
        fail(
            "with the loss sum and the target count both multiplied by 64, the update is "
            f"{float(updates[1].norm() / updates[0].norm()):.4g} times as large: the gradient is clipped while scaled",
            likely=("clip-before-unscale",),
            advice="Unscale (or divide by the count) first, then clip, then step.",
        )


@needs(CAUSAL)
def check_an_objective_sums_and_counts(subject: Subject) -> None:
    """The objective of a batch must return the sum of the losses of its unmasked targets, and their number."""
    objective, pad_batch = (subject.part(name) for name in ("objective", "pad_batch"))
    if objective is None or pad_batch is None:
        raise NotApplicable("no objective and no function that makes batches were found in your file")
    model, window = model_of(subject), examples(subject, 4)
    losses = Losses(subject, model)
    for side in ("right", "left"):
        batch = pad_batch(window, side=side)
        total, count = (value.detach().item() for value in objective(model, batch))
        _, want, targets = losses.sums(window)
        places = batch.targets.numel()
        if math.isclose(total, want, rel_tol=1e-9) and count == targets:
            continue
        fail(
            f"for {len(window)} examples padded on the {side} ({targets} targets in {places} positions) the objective "
            f"gives a sum of {total:.6g} over {count:g} targets, expected {want:.6g} over {targets}"
            + (": the padding is counted" if count == places else "")
            + (": the sum is already a mean" if math.isclose(total * targets, want, rel_tol=1e-6) else ""),
            likely=("objective-counts-padding",) if count == places else ("objective-sums-padding",),
            advice="Return loss_sum(logits, targets, loss_mask), and pass the padding mask to the model.",
            side=side,
        )


@needs(FOLLOWS)
def check_the_reported_loss_is_that_of_the_step(subject: Subject) -> None:
    """The loss reported by a step must be the mean over all targets of its batch, at the weights before the step."""
    if subject.brings("trainer"):
        window = examples(subject, 5)
        run = TrainerRun(subject, model_of(subject), window, batch_size=5, micro_batch_size=2)
        step, model, size = run.step(), run.model, 2
    else:
        met = met_step(subject)
        step, model, size = met.first, model_of(subject).to(met.dtype), 3
        write(model, step.after)
    if step.loss is None:
        raise NotApplicable(NO_LOSS)
    losses = Losses(subject, model)
    want = at(model, step, losses.mean)[1]
    tolerance = 1e-6 if next(model.parameters()).dtype == torch.float64 else 1e-4
    if math.isclose(step.loss, want, rel_tol=tolerance):
        return
    parts = [step.examples[i : i + size] for i in range(0, len(step.examples), size)]
    sums = [at(model, step, lambda _, part=part: losses.sums(part)[1:]) for part in parts]
    total, count = sum(s for s, _ in sums), sum(n for _, n in sums)
    meanings: list[tuple[str, float, tuple[str, ...]]] = [
        ("the sum over the targets", total, ()),
        ("the mean of the micro-batches' means", sum(s / n for s, n in sums) / len(sums), ("reported-mean-of-means",)),
        ("the loss of the last micro-batch alone", sums[-1][0] / sums[-1][1], ("reported-last-micro-batch",)),
        ("the loss at the weights after the step", losses.mean(step.examples)[1], ("reported-after-the-step",)),
        ("the mean over examples, not over targets", total / len(step.examples), ()),
    ]
    says, likely = next(((m, k) for m, v, k in meanings if math.isclose(step.loss, v, rel_tol=1e-4)), ("", ()))
    text = f"a step reports a loss of {step.loss:.6g}, expected {want:.6g} (the mean over the {count} targets)"
    if not subject.brings("trainer") and not likely:
        advise(text + (f": it is {says}" if says else ""))
        if not says:
            raise NotApplicable(OTHER_LOSS, reported=step.loss, mean=want)
        return
    fail(
        text + (f": it is {says}" if says else ""),
        likely=likely,
        advice="Add up the losses of all targets of the batch, and divide once by their number.",
        got=step.loss,
        want=want,
    )


@needs(FOLLOWS)
def check_a_step_is_made_in_train_mode(subject: Subject) -> None:
    """Every module must be in train mode during a step, even if the caller or an evaluation left eval mode on."""
    if not subject.brings("trainer"):
        mode_of_train_step(subject)
        return
    window = examples(subject, 3)
    run = TrainerRun(subject, model_of(subject), window, validation=window, batch_size=3)
    for before in ("the caller's eval()", "an evaluation"):
        if before == "an evaluation" and hasattr(run.trainer, "evaluate"):
            run.trainer.evaluate(run.data.validation)
        else:
            run.model.eval()
        with watched_modes(run.model) as modes:
            run.step()
        refuse_eval_mode(modes, before)


def mode_of_train_step(subject: Subject) -> None:
    met = met_step(subject)
    model = model_of(subject).to(met.dtype).eval()
    with watched_modes(model) as modes:
        met.run(model, torch.optim.SGD(model.parameters(), lr=RATE), met.first.examples)
    if modes and all(modes[0].values()):
        return
    model.train()
    with watched_modes(model) as again:
        met.run(model, torch.optim.SGD(model.parameters(), lr=RATE), met.first.examples)
    refuse_eval_mode(again, "the caller's train()")
    if modes:
        advise("train_step leaves the mode to its caller: call model.train() before it, and after every evaluation")


@contextmanager
def watched_modes(model: nn.Module) -> Iterator[list[dict[str, bool]]]:
    """The mode of every module at each call of the model."""
    modes: list[dict[str, bool]] = []
    forward = model.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        modes.append({name: module.training for name, module in model.named_modules()})
        return forward(*args, **kwargs)

    model.__dict__["forward"] = seen
    try:
        yield modes
    finally:
        model.__dict__.pop("forward")


def refuse_eval_mode(modes: list[dict[str, bool]], before: str) -> None:
    wrong = [name or "the model" for name, training in modes[0].items() if not training] if modes else []
    if wrong:
        fail(
            f"after {before}, a step runs in eval mode ({len(wrong)} of {len(modes[0])} modules, the first is "
            f"{wrong[0]}): training continues without dropout",
            likely=("train-mode-never-set", "train-mode-never-restored", "eval-not-restored"),
            advice="Call model.train() at the start of every step, or restore the mode at the end of evaluate.",
            modules=wrong[:10],
        )


@needs(CAUSAL, FOLLOWS)
def check_a_uniform_stream_is_never_learned(subject: Subject) -> None:
    """On fresh uniform random tokens the loss must not fall below ln V, because there is nothing to predict."""
    if not subject.causal:
        raise NotApplicable("the model is declared not to be causal")
    expect_trainable(subject)
    losses = stream_losses(subject, subject.affordable(36 * STREAM_STEPS, 16, least=4, sweeps=4))
    least, last = math.log(subject.sizes.vocab_size), sum(losses[-10:]) / 10
    note(reached=last, least=least, steps=STREAM_STEPS)
    if last < least - 0.1:
        fail(
            f"on uniform random tokens the loss falls to {last:.4g} in {STREAM_STEPS} steps, below ln "
            f"{subject.sizes.vocab_size} = {least:.4g}: the model sees its targets, "
            + ("each of which is the token just read" if last < 0.3 * least else "through attention to later tokens"),
            likely=(
                ("dataset-target-off-by-one", "label-shift-missing")
                if last < 0.3 * least
                else ("no-causal-mask", "causal-sees-one-future")
            ),
            advice="Use the tokens that follow as targets, and mask later positions in attention.",
            losses=[round(loss, 4) for loss in losses],
        )


def stream_losses(subject: Subject, rows: int = 16) -> list[float]:
    """The losses reported while training on new examples only, with the subject's own batches, loss and step."""
    longest = min(12, subject.sizes.block_size)
    stream = examples(subject, rows * STREAM_STEPS, ragged=False, longest=longest, seed=3)
    model = model_of(subject).float()
    if subject.brings("train_step") and not subject.brings("trainer"):
        met = met_step(subject)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps = [met.run(model, optimizer, stream[i : i + rows]) for i in range(0, len(stream), rows)]
        losses = [step.loss for step in steps if step.loss is not None]
        if len(losses) < len(steps):
            raise NotApplicable(NO_LOSS)
        first = model_of(subject).float()
        want = Losses(subject, first).mean(stream[:rows])[1]
        # Loose: this only distinguishes a mean from a sum or a perplexity; another check judges the reported loss.
        if not math.isclose(losses[0], want, rel_tol=0.05):
            raise NotApplicable(OTHER_LOSS, reported=losses[0], mean=want)
        return losses
    run = TrainerRun(
        subject,
        model,
        stream,
        own=True,
        sgd=False,
        batch_size=rows,
        learning_rate=1e-2,
        objective=objective_in_use(subject),
    )
    pad_batch = subject.part("pad_batch")
    if pad_batch is not None:
        run.data.batch = pad_batch  # type: ignore[method-assign]
    return [float(run.trainer.step()) for _ in range(STREAM_STEPS)]


def objective_in_use(subject: Subject) -> Any:
    """The subject's own objective; otherwise one made from its loss if that is a mean; otherwise the formula."""
    own = subject.part("objective")
    if own is not None:
        return own
    try:
        loss = met_loss(subject)
    except NotApplicable:
        return None
    if loss.inside_model or loss.domain != "logits" or loss.reduction != "mean":
        return None

    def objective(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        count = torch.tensor(batch.targets.numel())
        return loss(subject.logits(model, batch.tokens), batch.targets) * count, count

    return objective
