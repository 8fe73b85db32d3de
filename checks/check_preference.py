"""Preference and distillation losses: from which tokens they learn, in which direction, and where they are at rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .expect import READABLE, NotApplicable, advise, fail, needs, note
from .loss.met_answers import MIXES, Answers, B, MetAnswers, met_answers
from .probes.filled import judged
from .subject import Companion, Subject

PREFERENCE, DISTILLATION = "preference loss", "distillation loss"
ANSWERS = "check_preference.check_a_loss_learns_from_the_tokens_of_its_mask"
CLOSE = 1e-4  # relative, of sums of a few log-probabilities in float32


def learned(met: MetAnswers, data: Answers, policy: Tensor, other: Tensor) -> tuple[float, Tensor, Tensor]:
    """The loss, and its gradients to the policy's leaves and to the reference's."""
    policy, other = policy.clone().requires_grad_(), other.clone().requires_grad_()
    loss = met(data, policy, other)
    if not loss.requires_grad:
        raise NotApplicable("it returns a number without a gradient")
    loss.backward()  # type: ignore[no-untyped-call]
    mine, beyond = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (policy, other))
    return float(loss), mine, beyond


@needs(*READABLE)
def check_a_loss_learns_from_the_tokens_of_its_mask(subject: Subject) -> None:
    """A preference or distillation loss must have a gradient at the tokens that its masks keep and at no others."""
    note(judged=judged(subject, PREFERENCE, DISTILLATION, judge=lambda one: expect_masked(subject, one)))


def expect_masked(subject: Subject, one: Companion) -> int:
    met, data = met_answers(subject, one), Answers(subject, subject.seed)
    masked = met.takes("mask") or (one.kind == PREFERENCE and met.takes("labels"))
    if met.what == "logps" or not masked:
        raise NotApplicable("it takes no mask of the tokens that it learns from")
    _, gradient, beyond = learned(met, data, met.leaves(1), met.leaves(2))
    if beyond.any():
        advise(f"{one.name} also sends a gradient into {'the reference' if one.kind == PREFERENCE else 'the teacher'}")
    live = gradient.abs().sum(-1) > 0
    if not live.any():
        raise NotApplicable("it has no gradient to the logits")
    if one.kind == PREFERENCE:
        for side, rows in (("chosen", slice(0, B)), ("rejected", slice(B, 2 * B))):
            expect_answer(one, data, live[rows, :-1], side)
    else:
        expect_answer(one, data, live[:B], "")
    return int(live.sum())


def expect_answer(one: Companion, data: Answers, live: Tensor, side: str) -> None:
    """`live` [B, T - 1] are the logits with a gradient, each before its target; of a distillation loss [B, T]."""
    counts = data.side(data.counts, side)
    if not side:  # a mask of places, or of the targets of places
        if torch.equal(live, counts) or torch.equal(live[:, :-1], counts[:, 1:]):
            return
        counts = (
            counts if int((live != counts).sum()) <= int((live[:, :-1] != counts[:, 1:]).sum()) else counts.roll(-1, 1)
        )
    else:
        counts = counts[:, 1:]
    if torch.equal(live, counts):
        return
    if side and torch.equal(live, data.side(data.counts, side)[:, :-1]):
        advise(f"{one.name} applies its mask to the tokens read, not to their targets: it learns one token late")
        return
    answer = f"the {side} answers" if side else "its rows"
    wrongly, missed = live & ~counts, counts & ~live
    swapped = side and torch.equal(live, data.side(data.counts, "rejected" if side == "chosen" else "chosen")[:, 1:])
    if swapped:
        why = f": it uses the mask of the {'rejected' if side == 'chosen' else 'chosen'} answers"
    elif torch.equal(live, ~counts):
        why = ": the mask is the wrong way round"
    else:
        why = ""
    row, place = (int(i) for i in (wrongly | missed).nonzero()[0])
    does = "learns from" if wrongly[row, place] else "does not learn from"
    is_answer = "masked" if wrongly[row, place] else "not masked"
    fail(
        f"of {answer}, {one.name} learns from {int(wrongly.sum())} masked tokens and not from {int(missed.sum())} of "
        f"the {int(counts.sum())} that its mask keeps{why}; first row {row}, token {place + bool(side)}: it is "
        f"{is_answer}, and the loss {does} it",
        where=one.where,
        likely=("preference-mask-inverted", "preference-mask-of-the-other-answer", "distillation-ignores-its-mask"),
        advice="Multiply the log-probabilities of the targets tokens[:, 1:] by mask[:, 1:], 1 for tokens of the "
        "answer, each answer with its own mask.",
        wrongly=int(wrongly.sum()),
        missed=int(missed.sum()),
    )


@needs(*READABLE, ANSWERS)
def check_a_preference_loss_prefers_the_chosen_answer(subject: Subject) -> None:
    """A preference loss must fall as the policy finds the chosen answer likelier, and rise with the rejected one."""
    note(judged=judged(subject, PREFERENCE, judge=lambda one: expect_preferred(subject, one)))


def expect_preferred(subject: Subject, one: Companion) -> dict[str, float]:
    met, data = met_answers(subject, one), Answers(subject, subject.seed)
    leaves = met.leaves(1)
    _, gradient, _ = learned(met, data, leaves, leaves)
    slopes = gradient
    if met.what == "logits":  # of the targets' own: softmax turns the others the other way
        slopes = gradient[:, :-1].gather(-1, data.tokens[:, 1:, None])[..., 0].sum(-1)
    chosen, rejected = float(slopes[:B].sum()), float(slopes[B:].sum())
    if not (chosen < 0 < rejected):
        if not slopes.any():
            raise NotApplicable("it has no gradient to the policy where policy and reference are the same")
        what = "the wrong way round" if chosen > 0 > rejected else "not a preference"
        fail(
            f"{one.name} changes by {chosen:+.3g} for a nat more on the chosen answers (should fall) and by "
            f"{rejected:+.3g} for a nat more on the rejected ones (should rise): it is {what}",
            where=one.where,
            likely=("preference-sign-turned", "preference-swaps-policy-and-reference"),
            advice="-logsigmoid(beta * ((policy_chosen - policy_rejected) - (reference_chosen - reference_rejected))).",
            chosen=chosen,
            rejected=rejected,
        )
    return {"chosen": chosen, "rejected": rejected}


@needs(*READABLE, ANSWERS)
def check_a_preference_loss_is_ln_2_at_its_reference(subject: Subject) -> None:
    """DPO's loss must be ln 2 where policy and reference give the same probabilities: neither answer has gained."""
    note(judged=judged(subject, PREFERENCE, judge=lambda one: expect_ln_2(subject, one)))


def expect_ln_2(subject: Subject, one: Companion) -> float:
    met = met_answers(subject, one)
    if not met.has_other:
        raise NotApplicable("it takes no reference")
    if "dpo" not in one.name.lower():
        raise NotApplicable("only DPO's loss is known to be ln 2 there")
    data, leaves = Answers(subject, subject.seed), met.leaves(1)
    loss = float(met(data, leaves, leaves))
    if not any(math.isclose(loss, times * math.log(2), rel_tol=CLOSE) for times in (1, B)):
        fail(
            f"{one.name} is {loss:.4g} where policy and reference give the same probabilities, should be ln 2 = "
            "0.6931: the margin of the reference is not taken off that of the policy",
            where=one.where,
            likely=("preference-without-its-reference",),
            advice="Take the same sum of log-probabilities of policy and reference, over the same tokens, and subtract "
            "the reference's margin from the policy's.",
            loss=loss,
        )
    return loss


@needs(*READABLE)
def check_a_distillation_loss_is_zero_at_its_teacher(subject: Subject) -> None:
    """A distillation loss must be 0 where student and teacher give the same logits, and above 0 elsewhere."""
    note(judged=judged(subject, DISTILLATION, judge=lambda one: expect_zero(subject, one)))


def expect_zero(subject: Subject, one: Companion) -> float:
    met, data = met_answers(subject, one), Answers(subject, subject.seed)
    student, teacher = met.leaves(1), met.leaves(2)
    mixes = [
        name for name, role in met.roles.items() if role.what == "number" and any(m in name.lower() for m in MIXES)
    ]
    if met.takes("labels") and not mixes:
        raise NotApplicable("it also learns from labels, and no parameter says how much")
    settings: list[dict[str, float]] = [dict.fromkeys(mixes, share) for share in (1.0, 0.0)] if mixes else [{}]
    losses = [(float(met(data, teacher, teacher, **s)), float(met(data, student, teacher, **s))) for s in settings]
    same, apart = min(losses, key=lambda pair: abs(pair[0]))
    if not (apart > 0 and abs(same) <= CLOSE * max(apart, 1.0)):
        fail(
            f"{one.name} is {same:.4g} where student and teacher give the same logits and {apart:.4g} where they do "
            "not, should be 0 and more than 0",
            where=one.where,
            likely=("distillation-takes-log-probabilities-for-probabilities",),
            advice="F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction='batchmean', "
            "log_target=True): its first argument is a log-probability, its second one only with log_target=True.",
            same=same,
            apart=apart,
        )
    return same
