"""Wrong preference and distillation losses: their masks, their sign, their reference."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..check_preference import (
    check_a_distillation_loss_is_zero_at_its_teacher,
    check_a_loss_learns_from_the_tokens_of_its_mask,
    check_a_preference_loss_is_ln_2_at_its_reference,
    check_a_preference_loss_prefers_the_chosen_answer,
)
from . import bug
from .toolbox import distillation_loss as right_distillation_loss
from .toolbox import dpo_loss as right_dpo_loss
from .toolbox import parts_with_companions, replace, sum_of_log_probabilities

PREFERENCE, DISTILLATION = "preference loss", "distillation loss"


@bug(
    "the mask of a preference loss is the wrong way round: it learns from the prompts",
    check_a_loss_learns_from_the_tokens_of_its_mask,
    of=parts_with_companions,
)
def preference_mask_inverted(parts: SimpleNamespace) -> None:
    def dpo_loss(
        policy: nn.Module,
        reference: nn.Module,
        chosen: Tensor,
        rejected: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
    ) -> Tensor:
        return right_dpo_loss(policy, reference, chosen, rejected, 1 - chosen_mask, 1 - rejected_mask)

    replace(parts, PREFERENCE, dpo_loss)


@bug(
    "the chosen answers' mask is used for the rejected ones too",
    check_a_loss_learns_from_the_tokens_of_its_mask,
    of=parts_with_companions,
)
def preference_mask_of_the_other_answer(parts: SimpleNamespace) -> None:
    def dpo_loss(
        policy: nn.Module,
        reference: nn.Module,
        chosen: Tensor,
        rejected: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
    ) -> Tensor:
        return right_dpo_loss(policy, reference, chosen, rejected, chosen_mask, chosen_mask)

    replace(parts, PREFERENCE, dpo_loss)


@bug(
    "the sign of a preference loss is turned: it learns to give the rejected answers",
    check_a_preference_loss_prefers_the_chosen_answer,
    of=parts_with_companions,
)
def preference_sign_turned(parts: SimpleNamespace) -> None:
    def dpo_loss(
        policy: nn.Module,
        reference: nn.Module,
        chosen: Tensor,
        rejected: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
    ) -> Tensor:
        return right_dpo_loss(policy, reference, rejected, chosen, rejected_mask, chosen_mask)

    replace(parts, PREFERENCE, dpo_loss)


@bug(
    "policy and reference change places in the margin",
    check_a_preference_loss_prefers_the_chosen_answer,
    of=parts_with_companions,
)
def preference_swaps_policy_and_reference(parts: SimpleNamespace) -> None:
    def dpo_loss(
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        beta: float = 0.1,
    ) -> Tensor:
        margin = policy_chosen_logps - policy_rejected_logps
        return -F.logsigmoid(beta * (reference_chosen_logps - reference_rejected_logps - margin)).mean()

    replace(parts, PREFERENCE, dpo_loss)


@bug(
    "a preference loss leaves its reference out",
    check_a_preference_loss_is_ln_2_at_its_reference,
    of=parts_with_companions,
)
def preference_without_its_reference(parts: SimpleNamespace) -> None:
    def dpo_loss(
        policy: nn.Module,
        reference: nn.Module,
        chosen: Tensor,
        rejected: Tensor,
        chosen_mask: Tensor,
        rejected_mask: Tensor,
    ) -> Tensor:
        chosen_sum = sum_of_log_probabilities(policy, chosen, chosen_mask)
        return -F.logsigmoid(0.1 * (chosen_sum - sum_of_log_probabilities(policy, rejected, rejected_mask))).mean()

    replace(parts, PREFERENCE, dpo_loss)


@bug(
    "a distillation loss ignores its mask and learns from padding",
    check_a_loss_learns_from_the_tokens_of_its_mask,
    of=parts_with_companions,
)
def distillation_ignores_its_mask(parts: SimpleNamespace) -> None:
    def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
        return right_distillation_loss(student_logits, teacher_logits, torch.ones_like(mask))

    replace(parts, DISTILLATION, distillation_loss)


@bug(
    "kl_div gets the teacher's log-probabilities where it takes probabilities",
    check_a_distillation_loss_is_zero_at_its_teacher,
    of=parts_with_companions,
)
def distillation_takes_log_probabilities_for_probabilities(parts: SimpleNamespace) -> None:
    def distillation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return F.kl_div(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean")

    replace(parts, DISTILLATION, distillation_loss)
