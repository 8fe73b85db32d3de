"""Evaluation: the loss or perplexity that it reports, and that it does not change the training.

A trainer's `evaluate` is judged first, then functions of a file that take the model and report a loss or perplexity.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .expect import READABLE, NotApplicable, advise, fail, needs, note
from .probes.filled import judged
from .probes.scripted_logits import Script, scripted
from .subject import Companion, Subject
from .training.met_evaluation import MetEvaluation, is_perplexity, met_evaluation, rows_for
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


# -- functions of a file that take the model: evaluate, perplexity, …

UNIFORM = "check_evaluation.check_perplexity_of_uniform_logits_is_the_vocabulary"
CLOSE = 1e-4  # relative, of numbers that float32 losses of a few tokens add up to
MOST = 0.9  # of the targets: windows side by side lose one each
SURE = 30.0  # nats between the token that a scripted model expects and every other one


@needs(*READABLE)
def check_a_function_that_evaluates_leaves_the_model_alone(subject: Subject) -> None:
    """A function that evaluates the model must not change its weights or gradients, or seed the random generators."""
    note(judged=judged(subject, "evaluation", judge=lambda one: expect_untouched(subject, one)))


def expect_untouched(subject: Subject, one: Companion) -> str:
    met = met_evaluation(subject, one)
    model = subject.build().train()
    trainable = [p.requires_grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    weights, after = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    rows = rows_for(subject, met)
    for seed in (101, 102):
        with seeded(subject.seed + seed):
            met(model, rows)
            after.append(states())
        if seed == 101:
            moved = [n for n, p in model.named_parameters() if not torch.equal(p, weights[n])]
            if moved:
                fail_moved(model, weights, moved, one)
            expect_gradients_kept(model, trainable, one)
    same = [name for name, state in after[0].items() if name != "CUDA" and state == after[1][name]]
    if same:
        fail(
            f"{one.name} leaves the random generator of {' and '.join(same)} in the same state whatever it was before: "
            "after every evaluation, training repeats the same dropout and the same order of the data",
            where=one.where,
            likely=("evaluation-seeds",),
            advice="Use a torch.Generator of its own in an evaluation, or fork the state: torch.random.fork_rng().",
        )
    left = sum(not module.training for module in model.modules())
    if left:
        advise(
            f"{one.name} leaves the model in eval mode: training goes on without dropout unless it calls model.train()"
        )
    return met.form


def fail_moved(model: nn.Module, weights: dict[str, Tensor], moved: list[str], one: Companion) -> None:
    now = dict(model.named_parameters())
    largest = max(float((now[n].detach() - weights[n]).abs().max()) for n in moved)
    fail(
        f"{one.name} changes the weights: {len(moved)} of {len(weights)} parameters are others after it, first "
        f"{moved[0]}, by up to {largest:.3g}. Training goes on from these",
        where=one.where,
        likely=("average-left-in-the-model", "evaluation-steps"),
        advice="Put back what was swapped in (averaged weights, say) before it returns, and make no optimizer step.",
        parameters=moved,
    )


def expect_gradients_kept(model: nn.Module, trainable: list[bool], one: Companion) -> None:
    frozen = sum(before and not p.requires_grad for before, p in zip(trainable, model.parameters(), strict=True))
    if frozen:
        fail(
            f"{one.name} leaves {frozen} of {len(trainable)} parameters with requires_grad=False: training no longer "
            "changes them",
            where=one.where,
            likely=("evaluation-freezes",),
            advice="Compute under torch.no_grad() instead of changing requires_grad.",
        )
    held = [p.grad for p in model.parameters() if p.requires_grad]
    if all(g is None or not g.any() for g in held):
        advise(f"{one.name} clears the gradients: call it after an optimizer step, never between backward() and step()")
    elif any(g is None or not bool((g == 0.5).all()) for g in held):
        other = sum(g is None or not bool((g == 0.5).all()) for g in held)
        fail(
            f"{one.name} changes the gradients of {other} of {len(held)} parameters: those of the evaluation are added "
            "to the next training step",
            where=one.where,
            likely=("evaluation-adds-gradients",),
            advice="Compute under torch.no_grad(), without backward().",
        )


@needs(*READABLE)
def check_perplexity_of_uniform_logits_is_the_vocabulary(subject: Subject) -> None:
    """The perplexity of uniform logits must be the vocabulary size, and their loss its logarithm, for every stride."""
    note(judged=judged(subject, "evaluation", judge=lambda one: expect_uniform(subject, one)))


def expect_uniform(subject: Subject, one: Companion) -> str:
    met = met_evaluation(subject, one)
    numbers = [under(met, uniform(subject), rows_for(subject, met), stride) for stride in met.strides]
    known = meaning(subject, met, numbers[0])
    if known is not None:
        key, means = known
        off = next(
            (s for s, n in zip(met.strides, numbers, strict=True) if not close(n[key], of_nats(means, ln(subject)))),
            None,
        )
        if off is None:
            return means
        stride, got, want = f" at stride {off}", numbers[met.strides.index(off)][key], of_nats(means, ln(subject))
    elif is_perplexity(one.name) and len(numbers[0]) == 1:
        stride, (got,), want = "", numbers[0].values(), float(subject.width)
    else:
        raise NotApplicable(f"for uniform logits it returns {shown(numbers[0])}, no loss and no perplexity")
    fail(
        f"{one.name} gives {got:.4g} for uniform logits{stride}, should be {want:.4g}: the perplexity of "
        f"{subject.width} equally likely ids is {subject.width}, their loss ln {subject.width} = {ln(subject):.4g}",
        where=one.where,
        likely=("perplexity-divides-by-all-tokens",),
        advice="Add up the losses of the targets that count, divide by their number, and take exp once.",
        got=got,
        want=want,
    )


@needs(*READABLE, UNIFORM)
def check_every_token_of_a_text_weighs_alike(subject: Subject) -> None:
    """An evaluation must be the mean over all the targets that it counts, each weighing alike, whatever the windows."""
    note(judged=judged(subject, "evaluation", judge=lambda one: expect_alike(subject, one)))


def expect_alike(subject: Subject, one: Companion) -> dict[str, int]:
    met = met_evaluation(subject, one)
    return {str(stride or "windows"): expect_alike_at(subject, met, stride) for stride in met.strides}


def expect_alike_at(subject: Subject, met: MetEvaluation, stride: int | None) -> int:
    """How many targets count: of a model whose logits are the same everywhere, a target's loss is its token's."""
    rows = rows_for(subject, met, seed=subject.seed)
    key, means = meant(subject, met, rows, stride)
    scores = torch.linspace(0, 3, subject.width, dtype=torch.float64)
    nats = -scores.log_softmax(0).to(rows.device)

    def told(ids: Tensor) -> float:
        return in_nats(means, under(met, lambda tokens: scores.expand(*tokens.shape, -1), ids, stride)[key])

    loss = told(rows)
    if close(loss, float(nats[rows[:, 1:]].mean())):
        return rows[:, 1:].numel()
    if not close(told(rows), loss):
        raise NotApplicable("it returns another number for the same data: it draws what it evaluates")
    plain, high = torch.zeros_like(rows), subject.sizes.vocab_size - 1
    base, shares = told(plain), []
    for place in [(r, t) for r in range(len(rows)) for t in range(1, rows.shape[1])]:
        ids = plain.clone()
        ids[place] = high
        shares.append((told(ids) - base) / float(nats[high] - nats[0]))
    counted = [share for share in shares if abs(share) > CLOSE]
    if not counted:
        raise NotApplicable("no token of the text changes what it returns")
    if not (close(max(counted), min(counted)) and close(sum(counted), 1)):
        fail_unalike(met.companion, shares, stride)
    if len(counted) < MOST * len(shares):
        advise(f"{met.companion.name} counts {len(counted)} of {len(shares)} targets")
    return len(counted)


def fail_unalike(one: Companion, shares: list[float], stride: int | None) -> None:
    counted = [share for share in shares if abs(share) > CLOSE]
    most, least = max(counted, key=abs), min(counted, key=abs)
    at = f" at stride {stride}" if stride else ""
    if close(most, least):
        says = f"each of {len(counted)} targets weighs {most:.4g}, together {sum(counted):.4g}, should be 1"
    else:
        says = (
            f"target {shares.index(most) + 1} of {len(shares)} weighs {most / least:.3g} times as much as target "
            f"{shares.index(least) + 1} ({most:.4g} against {least:.4g}, should be {1 / len(counted):.4g} each)"
        )
    fail(
        f"{one.name} is no mean over the tokens{at}: {says}",
        where=one.where,
        likely=("perplexity-mean-of-means", "perplexity-counts-overlaps"),
        advice="Add up the losses of the targets that no earlier window has counted, and their number, and divide once "
        "at the end; take exp of the quotient.",
        weights=[round(share, 6) for share in shares],
    )


@needs(*READABLE, UNIFORM)
def check_an_evaluation_predicts_the_next_token(subject: Subject) -> None:
    """A model that knows every next token must have the perplexity 1, and the loss 0, of a text handed over whole."""
    note(judged=judged(subject, "evaluation", judge=lambda one: expect_known(subject, one)))


def expect_known(subject: Subject, one: Companion) -> float:
    met, V = met_evaluation(subject, one), subject.sizes.vocab_size
    if not met.is_stream:
        raise NotApplicable("it is given targets with the tokens")
    rows = rows_for(subject, met)
    rows = (torch.arange(rows.shape[1], device=rows.device) % V)[None]
    key, means = meant(subject, met, rows, met.strides[0])

    def told(ahead: int) -> float:
        def knowing(tokens: Tensor) -> Tensor:
            return SURE * torch.nn.functional.one_hot((tokens + ahead) % V, subject.width).double()

        return in_nats(means, under(met, knowing, rows, met.strides[0])[key])

    loss = told(1)
    if loss > CLOSE:
        other = next((ahead for ahead in (0, 2, -1) if told(ahead) < CLOSE), None)
        what = {0: "the token just read", 2: "the token after the next", -1: "the token before"}
        why = "" if other is None else f": its targets are {what[other]}"
        fail(
            f"{one.name} gives a loss of {loss:.4g} nats to a model that knows every next token, should be 0{why}",
            where=one.where,
            likely=("perplexity-of-the-token-read",),
            advice="Compare logits[:, :-1] with ids[:, 1:]; a model or loss that shifts by itself takes ids and labels "
            "alike.",
            loss=loss,
        )
    return loss


def uniform(subject: Subject) -> Script:
    return lambda tokens: torch.zeros(*tokens.shape, subject.width, dtype=torch.float64)


def under(met: MetEvaluation, script: Script, rows: Tensor, stride: int | None) -> dict[str, float]:
    """The numbers of an evaluation of a model that gives these logits."""
    subject = met.subject
    model = subject.build()
    with scripted(subject, model, script):
        try:
            return met(model, rows, stride=stride)
        except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError) as error:
            raise NotApplicable(f"it fails on a model with given logits: {type(error).__name__}: {error}") from None


def ln(subject: Subject) -> float:
    return math.log(subject.width)


MEANINGS = ("perplexity", "loss", "bits")


def of_nats(means: str, nats: float) -> float:
    return {"perplexity": math.exp(min(nats, 700)), "loss": nats, "bits": nats / math.log(2)}[means]


def in_nats(means: str, number: float) -> float:
    return {"perplexity": math.log(max(number, 1e-300)), "loss": number, "bits": number * math.log(2)}[means]


def meaning(subject: Subject, met: MetEvaluation, numbers: dict[str, float]) -> tuple[str, str] | None:
    """The first of these numbers that stands for uniform logits, and what it is; None if none does."""
    for key, number in numbers.items():
        for means in MEANINGS:
            if close(number, of_nats(means, ln(subject))):
                return key, means
    return None


def meant(subject: Subject, met: MetEvaluation, rows: Tensor, stride: int | None) -> tuple[str, str]:
    found = meaning(subject, met, under(met, uniform(subject), rows, stride))
    if found is None:
        raise NotApplicable("what it returns for uniform logits is no loss and no perplexity")
    return found


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-9)


def shown(numbers: dict[str, float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers.values()) or "no number"
