"""Training: what one optimizer step does to the weights, against the gradient of examples taken one at a time.

A `Trainer`-like object is watched through its data and its objective; a plain `train_step` through what it is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .expect import CAUSAL, FOLLOWS, NotApplicable, advise, fail, needs, note
from .loss.met_loss import met_loss
from .subject import Subject
from .training.explained import (
    Micro,
    accumulation_mistakes,
    angle,
    cause,
    clipped,
    clipping_mistakes,
    near,
    step_mistakes,
)
from .training.met_step import RATE, met_step
from .training.runs import Losses, Step, TrainerRun, examples, model_of, pieces, write
from .training.steps import (
    EXACT,
    at,
    follow_with_train_step,
    limit_cuts_the_gradient,
    padded_rows_count_by_their_targets,
    refuse_update,
    scaler_cancels,
)

STREAM_STEPS = 50


@needs(CAUSAL)
def check_a_step_follows_the_gradient(subject: Subject) -> None:
    """Plain steps move the weights by minus the learning rate times the gradient of the mean loss, step after step."""
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
                refuse_update(got, gradient, when, "nothing, and the next step's is this gradient", STALE)
            refuse_update(got, gradient, when, *cause(got, step_mistakes(got, gradient, earlier, count, rows)))
        earlier.append(gradient)


STALE = ("step-with-stale-gradient",)


WINDOWS = ((5, 2, False), (5, 2, True), (4, 3, True), (6, 1, False))  # examples, micro-batch size, clipped


@needs(FOLLOWS)
def check_micro_batches_add_up_to_the_whole(subject: Subject) -> None:
    """A window taken in micro-batches, ragged and the last one short, moves the weights as when taken whole."""
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
    losses: Losses, step: Step, window: list, size: int, limit: float | None, got: Tensor, want: Tensor
) -> None:
    seen = step.examples if len(step.examples) == len(window) else window
    sums = [losses.sums(seen[i : i + size]) for i in range(0, len(window), size)]
    targets = [n for _, _, n in sums]
    says, likely = cause(got, accumulation_mistakes([Micro(g, n) for g, _, n in sums], limit))
    if not says and len(step.examples) < len(window):
        says, likely = f"that of {len(step.examples)} examples: the others were never read", LAST_DROPPED
    fail(
        f"{len(window)} examples in micro-batches of {size} (of {targets} targets"
        + (f", clipped at {limit:.3g}" if limit else "")
        + f") move the weights by {float(got.norm()):.4g} × the learning rate, taken whole {float(want.norm()):.4g}, "
        f"{angle(got, want)}° apart" + (f": the update is {says}" if says else ""),
        likely=likely,
        advice="Add up the gradients of sums, and divide once by the targets of all micro-batches before clipping.",
        targets=targets,
        clip_norm=limit,
        examples_read=len(step.examples),
    )


LAST_DROPPED = ("accum-partial-window-dropped",)


@needs(FOLLOWS)
def check_clipping_scales_the_whole_gradient(subject: Subject) -> None:
    """Clipping at c multiplies the gradient of all parameters together by min(1, c / its length), before the step."""
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
            says, likely = "not clipped, for it is clipped only after the step", ("clip-after-step",)
        fail(
            f"a gradient of length {norm:.4g}, clipped at {share * norm:.4g}, moves the weights by "
            f"{float(got.norm()):.4g} × the learning rate instead of {float(want.norm()):.4g}, at an angle of "
            f"{angle(got, want)}°" + (f": it is {says}" if says else ""),
            likely=likely,
            advice="clip_grad_norm_(all parameters, c) after the last backward and before optimizer.step().",
            limit=share * norm,
            length=norm,
        )


@needs(FOLLOWS)
def check_the_loss_scale_cancels(subject: Subject) -> None:
    """Losses and their count scaled alike (as loss scaling does, then unscaled) leave the clipped update as it was."""
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
            "losses 64 times as large, over 64 times the count, move the weights "
            f"{float(updates[1].norm() / updates[0].norm()):.4g} times as far: the gradient is clipped while scaled",
            likely=("clip-before-unscale",),
            advice="Unscale (or divide by the count) first, then clip, then step.",
        )


@needs(CAUSAL)
def check_an_objective_sums_and_counts(subject: Subject) -> None:
    """The objective of a batch is the sum of the losses of its unmasked targets and their number."""
    objective, pad_batch = (subject.part(name) for name in ("objective", "pad_batch"))
    if objective is None or pad_batch is None:
        raise NotApplicable("the subject brings no objective over batches of its own")
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
            f"of {len(window)} examples padded on the {side} ({targets} targets, {places} places) the objective gives "
            f"a sum of {total:.6g} over {count:g} targets; it is {want:.6g} over {targets}"
            + (": the padding is counted" if count == places else "")
            + (": the sum is a mean already" if math.isclose(total * targets, want, rel_tol=1e-6) else ""),
            likely=("objective-counts-padding",) if count == places else ("objective-sums-padding",),
            advice="Return loss_sum(logits, targets, loss_mask), and give the model the padding mask.",
            side=side,
        )


@needs(FOLLOWS)
def check_the_reported_loss_is_that_of_the_step(subject: Subject) -> None:
    """The loss that a step reports is the mean over the targets of its window, at the weights before the step."""
    if subject.brings("trainer"):
        window = examples(subject, 5)
        run = TrainerRun(subject, model_of(subject), window, batch_size=5, micro_batch_size=2)
        step, model, size = run.step(), run.model, 2
    else:
        met = met_step(subject)
        step, model, size = met.first, model_of(subject).to(met.dtype), 3
        write(model, step.after)
    if step.loss is None:
        raise NotApplicable("a step reports no loss")
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
        ("that of the last micro-batch alone", sums[-1][0] / sums[-1][1], ("reported-last-micro-batch",)),
        ("that of the weights after the step", losses.mean(step.examples)[1], ("reported-after-the-step",)),
        ("the mean over examples, not over targets", total / len(step.examples), ()),
    ]
    says, likely = next(((m, k) for m, v, k in meanings if math.isclose(step.loss, v, rel_tol=1e-4)), ("", ()))
    text = f"a step reports a loss of {step.loss:.6g}; over the {count} targets of its window it was {want:.6g}"
    if not subject.brings("trainer") and not likely:
        advise(text + (f": it is {says}" if says else ""))
        if not says:
            raise NotApplicable("what the step reports is not the mean next-token loss", reported=step.loss, mean=want)
        return
    fail(
        text + (f": it is {says}" if says else ""),
        likely=likely,
        advice="Add up the losses of all targets of the window, and divide once by their count.",
        got=step.loss,
        want=want,
    )


@needs(FOLLOWS)
def check_a_step_is_made_in_train_mode(subject: Subject) -> None:
    """Every module is in train mode while a step computes, whatever the caller or an evaluation left behind."""
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
        advise("train_step leaves the mode to its caller: call model.train() before, also after every evaluation")


class watched_modes:
    """The mode of every module at each call of the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modes = model, []  # type: ignore[var-annotated]

    def __enter__(self) -> list[dict[str, bool]]:
        forward = self.model.forward

        def seen(*args: Any, **kwargs: Any) -> Any:
            self.modes.append({name: module.training for name, module in self.model.named_modules()})
            return forward(*args, **kwargs)

        self.model.__dict__["forward"] = seen
        return self.modes

    def __exit__(self, *_: Any) -> None:
        self.model.__dict__.pop("forward")


def refuse_eval_mode(modes: list[dict[str, bool]], before: str) -> None:
    asleep = [name or "the model" for name, training in modes[0].items() if not training] if modes else []
    if asleep:
        fail(
            f"after {before} a step is computed in eval mode ({len(asleep)} of {len(modes[0])} modules, first "
            f"{asleep[0]}): dropout is off from then on",
            likely=("train-mode-never-set", "train-mode-never-restored", "eval-not-restored"),
            advice="Call model.train() at the start of every step, or restore the mode at the end of evaluate.",
            modules=asleep[:10],
        )


@needs(CAUSAL, FOLLOWS)
def check_a_uniform_stream_is_never_learned(subject: Subject) -> None:
    """On fresh uniform random tokens no training gets its loss below ln V: there is nothing to predict."""
    if not subject.causal:
        raise NotApplicable("the subject is declared to see the future")
    losses = stream_losses(subject)
    least, last = math.log(subject.sizes.vocab_size), sum(losses[-10:]) / 10
    note(reached=last, least=least, steps=STREAM_STEPS)
    if last < least - 0.1:
        fail(
            f"on uniform random tokens the loss falls to {last:.4g} in {STREAM_STEPS} steps, below ln "
            f"{subject.sizes.vocab_size} = {least:.4g}: the targets can be seen ("
            + ("at once, so each is the token just read" if last < 0.3 * least else "slowly, so attention finds them")
            + ")",
            likely=(
                ("dataset-target-off-by-one", "label-shift-missing")
                if last < 0.3 * least
                else ("no-causal-mask", "causal-sees-one-future")
            ),
            advice="Targets are the tokens after those read, and no position may look ahead.",
            losses=[round(loss, 4) for loss in losses],
        )


def stream_losses(subject: Subject, rows: int = 16) -> list[float]:
    """Losses reported while training on examples that are all new, by the subject's own batches, loss and step."""
    longest = min(12, subject.sizes.block_size)
    stream = examples(subject, rows * STREAM_STEPS, ragged=False, longest=longest, seed=3)
    model = model_of(subject).float()
    if subject.brings("train_step") and not subject.brings("trainer"):
        met = met_step(subject)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        steps = [met.run(model, optimizer, stream[i : i + rows]) for i in range(0, len(stream), rows)]
        losses = [step.loss for step in steps if step.loss is not None]
        if len(losses) < len(steps):
            raise NotApplicable("a step reports no loss")
        first = model_of(subject).float()
        want = Losses(subject, first).mean(stream[:rows])[1]
        # Loose: this only tells a mean from a sum or a perplexity; what is reported is judged by its own check.
        if not math.isclose(losses[0], want, rel_tol=0.05):
            raise NotApplicable("what the step reports is not the mean next-token loss", reported=losses[0], mean=want)
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
    """The subject's own objective, else one of its own loss where that is a mean, else the formula."""
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
