"""Evaluation: the loss that it reports, and that it does not change the training."""

from __future__ import annotations

import copy
import math

import torch

from .expect import NotApplicable, fail, needs
from .subject import Subject
from .training.runs import Example, Losses, TrainerRun, examples, flat, model_of, needs_trainer
from .watch.draws import seeded, states

WEIGHS = "check_evaluation.check_evaluation_weighs_every_target_alike"


@needs("check_training.check_a_step_follows_the_gradient")
def check_evaluation_weighs_every_target_alike(subject: Subject) -> None:
    """The evaluation loss must be the mean over all targets of all examples, whatever the batches."""
    held_out, size = examples(subject, 7, seed=5), 3
    run = evaluating(subject, held_out, size, dropout=0.0)
    got, losses = float(run.trainer.evaluate(held_out)), Losses(subject, run.model)
    run.model.eval()
    want = losses.mean(held_out)[1]
    if math.isclose(got, want, rel_tol=1e-6):
        return
    sums = [losses.sums(held_out[i : i + size])[1:] for i in range(0, len(held_out), size)]
    total, count = sum(s for s, _ in sums), sum(n for _, n in sums)
    meanings: list[tuple[str, float, tuple[str, ...]]] = [
        ("the mean of the batches' means: targets in short batches count more",
         sum(s / n for s, n in sums) / len(sums), ("eval-mean-of-batch-means",)),
        ("the loss of the last batch alone", sums[-1][0] / sums[-1][1], ("eval-only-last-batch",)),
        ("the loss of the first batch alone", sums[0][0] / sums[0][1], ("eval-only-last-batch",)),
        ("the loss without the last batch", (total - sums[-1][0]) / (count - sums[-1][1]), ("eval-only-last-batch",)),
        ("the sum over the targets", total, ()),
        (f"the sum divided by the {len(held_out)} examples, not by their targets",
         total / len(held_out), ("eval-denominator-off-by-one",)),
        *((f"the sum divided by {count + k} instead of {count}", total / (count + k), ("eval-denominator-off-by-one",))
          for k in (-len(held_out), -1, 1, len(held_out))),
    ]  # fmt: skip
    says, likely = next(((m, k) for m, v, k in meanings if math.isclose(got, v, rel_tol=1e-6)), ("", ()))
    fail(
        f"evaluate returns {got:.6g} for {len(held_out)} examples in batches of {size} (with {[n for _, n in sums]} "
        f"targets), expected {want:.6g} (the mean over all {count} targets)" + (f": it is {says}" if says else ""),
        likely=likely,
        advice="Add up the loss sums and the target counts of all batches, and divide once.",
        got=got,
        want=want,
    )


@needs(WEIGHS)
def check_evaluation_is_without_dropout(subject: Subject) -> None:
    """Evaluation must run without dropout: it must give the loss of the model in eval mode, the same each time."""
    held_out = examples(subject, 4, seed=5)
    run = evaluating(subject, held_out, 2, dropout=0.3)
    once, again = (float(run.trainer.evaluate(held_out)) for _ in range(2))
    run.model.eval()
    want = Losses(subject, run.model).mean(held_out)[1]
    if not math.isclose(once, want, rel_tol=1e-6):
        noisy = f", then {again:.6g}" if once != again else " twice"
        fail(
            f"evaluate returns {once:.6g}{noisy}, expected {want:.6g} (the loss in eval mode): dropout is on",
            likely=("eval-with-dropout",),
            advice="Call model.eval() before an evaluation, and restore the mode after it.",
        )


@needs(WEIGHS)
def check_evaluation_leaves_no_trace(subject: Subject) -> None:
    """Evaluation must not change the weights, the mode or the random states."""
    held_out = examples(subject, 4, seed=5)
    run = evaluating(subject, held_out, 2, dropout=0.3)
    run.step()
    run.model.train()
    weights, modes = flat(run.model), [module.training for module in run.model.modules()]
    with seeded(subject.seed + 101):  # a state that nothing else starts from
        random = states()
        run.trainer.evaluate(held_out)
        drawn = [name for name, state in states().items() if state != random[name]]
    if not torch.equal(weights, flat(run.model)):
        fail(
            "an evaluation changes the weights",
            likely=("evaluate-trains",),
            advice="Compute losses under torch.no_grad(), without backward() or optimizer.step().",
        )
    left = sum(before and not after.training for before, after in zip(modes, run.model.modules(), strict=True))
    if left:
        fail(
            f"an evaluation leaves {left} of {len(modes)} modules in eval mode: training continues without dropout",
            likely=("eval-not-restored", "train-mode-never-restored"),
            advice="Restore the mode at the end of evaluate, even after an error.",
        )
    if drawn:
        fail(
            f"an evaluation changes the random state of {' and '.join(drawn)}, so it changes the dropout and the order "
            "of the training that follows",
            likely=("sampling-reseeds-training", "evaluation-draws"),
            advice="Use a separate torch.Generator in evaluate, or save and restore the random state.",
        )


@needs(WEIGHS)
def check_looking_does_not_change_the_training(subject: Subject) -> None:
    """Evaluating and sampling during training must not change the trained weights by a single bit."""
    held_out, ends = examples(subject, 4, seed=5), []
    for looks in (False, True):
        with seeded(7):
            run = evaluating(subject, held_out, 2, dropout=0.3)
            for _ in range(4):
                run.step()
                if looks:
                    run.trainer.evaluate(held_out)
                    sample(subject, run)
            ends.append(flat(run.model))
    if not torch.equal(*ends):
        fail(
            "four steps, each followed by an evaluation and a sample, give different weights from four steps alone "
            f"(largest difference {float((ends[0] - ends[1]).abs().max()):.3g}): they change the random numbers or the "
            "mode of the training",
            likely=("sampling-reseeds-training", "eval-not-restored"),
            advice="Do not call torch.manual_seed during training; sample with a separate generator.",
        )


def sample(subject: Subject, run: TrainerRun) -> None:
    """Samples as a user would during training: it draws random numbers, and some generates seed first."""
    generate = subject.part("generate")
    torch.rand(3)
    if generate is not None and not subject.foreign:
        generate(copy.deepcopy(run.model), torch.zeros(1, 1, dtype=torch.int64), 2, temperature=1.0)


def evaluating(subject: Subject, held_out: list[Example], size: int, *, dropout: float) -> TrainerRun:
    needs_trainer(subject)
    model = model_of(subject, dropout=dropout)
    run = TrainerRun(subject, model, examples(subject, 6), validation=held_out, batch_size=size)
    if not hasattr(run.trainer, "evaluate"):
        raise NotApplicable("your trainer has no evaluate")
    return run
