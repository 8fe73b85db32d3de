"""Evaluation during a training: what it measures, and that it leaves the training as it was."""

from __future__ import annotations

import copy
import math

import torch

from .expect import NotApplicable, fail, needs
from .subject import Subject
from .training.runs import Losses, TrainerRun, examples, flat, model_of, needs_trainer
from .watch.draws import seeded, states

WEIGHS = "check_evaluation.check_evaluation_weighs_every_target_alike"


@needs("check_training.check_a_step_follows_the_gradient")
def check_evaluation_weighs_every_target_alike(subject: Subject) -> None:
    """The loss of an evaluation is the mean over all targets of all examples, however they are batched."""
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
        ("the mean of the batches' means: a target in a short batch counts more",
         sum(s / n for s, n in sums) / len(sums), ("eval-mean-of-batch-means",)),
        ("that of the last batch alone", sums[-1][0] / sums[-1][1], ("eval-only-last-batch",)),
        ("that of the first batch alone", sums[0][0] / sums[0][1], ("eval-only-last-batch",)),
        ("without the last batch", (total - sums[-1][0]) / (count - sums[-1][1]), ("eval-only-last-batch",)),
        ("the sum over the targets", total, ()),
        (f"divided by the {len(held_out)} examples, not by their targets",
         total / len(held_out), ("eval-denominator-off-by-one",)),
        *((f"divided by {count + k} instead of {count}", total / (count + k), ("eval-denominator-off-by-one",))
          for k in (-len(held_out), -1, 1, len(held_out))),
    ]  # fmt: skip
    says, likely = next(((m, k) for m, v, k in meanings if math.isclose(got, v, rel_tol=1e-6)), ("", ()))
    fail(
        f"evaluate reports {got:.6g} for {len(held_out)} examples in batches of {size} (of {[n for _, n in sums]} "
        f"targets); their mean over all {count} targets is {want:.6g}" + (f": it is {says}" if says else ""),
        likely=likely,
        advice="Add up sums and counts over the batches, and divide once.",
        got=got,
        want=want,
    )


@needs(WEIGHS)
def check_evaluation_is_without_dropout(subject: Subject) -> None:
    """An evaluation of a model with dropout gives the loss that it has in eval mode, twice the same."""
    held_out = examples(subject, 4, seed=5)
    run = evaluating(subject, held_out, 2, dropout=0.3)
    once, again = (float(run.trainer.evaluate(held_out)) for _ in range(2))
    run.model.eval()
    want = Losses(subject, run.model).mean(held_out)[1]
    if not math.isclose(once, want, rel_tol=1e-6):
        noisy = f", and {again:.6g} the next time" if once != again else ", twice the same"
        fail(
            f"evaluate reports {once:.6g}{noisy}; in eval mode the loss is {want:.6g}: dropout is on",
            likely=("eval-with-dropout",),
            advice="Call model.eval() before an evaluation and restore the mode after it.",
        )


@needs(WEIGHS)
def check_evaluation_leaves_no_trace(subject: Subject) -> None:
    """Weights, mode and random states are the same after an evaluation as before."""
    held_out = examples(subject, 4, seed=5)
    run = evaluating(subject, held_out, 2, dropout=0.3)
    run.step()
    run.model.train()
    weights, modes = flat(run.model), [module.training for module in run.model.modules()]
    with seeded(subject.seed + 101):  # a state that no one else begins with
        random = states()
        run.trainer.evaluate(held_out)
        drawn = [name for name, state in states().items() if state != random[name]]
    if not torch.equal(weights, flat(run.model)):
        fail(
            "an evaluation changes the weights",
            likely=("evaluate-trains",),
            advice="An evaluation computes losses under torch.no_grad(); no backward, no optimizer.step().",
        )
    asleep = sum(before and not after.training for before, after in zip(modes, run.model.modules(), strict=True))
    if asleep:
        fail(
            f"an evaluation leaves {asleep} of {len(modes)} modules in eval mode: dropout is off from then on",
            likely=("eval-not-restored", "train-mode-never-restored"),
            advice="Restore the mode at the end of evaluate, also after an error.",
        )
    if drawn:
        fail(
            f"an evaluation changes the random state of {' and of '.join(drawn)}: what is drawn next depends on it",
            likely=("sampling-reseeds-training", "evaluation-draws"),
            advice="Use a torch.Generator of its own in evaluate, or save and restore the state.",
        )


@needs(WEIGHS)
def check_looking_does_not_change_the_training(subject: Subject) -> None:
    """A training with evaluations and sampling in between goes, bit for bit, as one without."""
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
            "four steps with an evaluation and a sampled text after each end at other weights than four steps alone "
            f"(largest difference {float((ends[0] - ends[1]).abs().max()):.3g}): looking changes what dropout or the "
            "order draws next",
            likely=("sampling-reseeds-training", "eval-not-restored"),
            advice="Never call torch.manual_seed while training; sample with a generator of its own.",
        )


def sample(subject: Subject, run: TrainerRun) -> None:
    """What sampling does to random states: some seed first, and all draw."""
    generate = subject.part("generate")
    torch.rand(3)
    if generate is not None and not subject.foreign:
        generate(copy.deepcopy(run.model), torch.zeros(1, 1, dtype=torch.int64), 2, temperature=1.0)


def evaluating(subject: Subject, held_out: list, size: int, *, dropout: float) -> TrainerRun:
    needs_trainer(subject)
    model = model_of(subject, dropout=dropout)
    run = TrainerRun(subject, model, examples(subject, 6), validation=held_out, batch_size=size)
    if not hasattr(run.trainer, "evaluate"):
        raise NotApplicable("the trainer has no evaluate")
    return run
