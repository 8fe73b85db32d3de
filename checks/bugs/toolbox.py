"""What files have beside a model, written right: evaluation, losses, schedule, average, optimizer, tokenizer.

Bugs replace one of them; `parts_with_companions` is the reference's model with all of them.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..expect import Where, shown
from ..reference import reference_parts
from ..subject import Companion


def companion(kind: str, value: Any) -> Companion:
    code = inspect.getsourcefile(value) or ""
    return Companion(
        kind, value.__name__, value, Where(value.__name__, kind, shown(code), inspect.getsourcelines(value)[1])
    )


def parts_with_companions(**config: Any) -> SimpleNamespace:
    """The reference's model with one companion of each kind."""
    found = (companion(kind, value) for kind, value in KINDS.items())
    return SimpleNamespace(build_model=reference_parts(**config).build_model, companions=tuple(found))


def replace(parts: SimpleNamespace, kind: str, value: Any) -> None:
    """Puts another companion of a kind into the place of the right one."""
    parts.companions = tuple(companion(kind, value) if one.kind == kind else one for one in parts.companions)


# -- evaluation


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, block_size: int, stride: int = 4) -> float:
    """Of one text [N], by overlapping windows; each target counts once."""
    return math.exp(mean_of_windows(model, ids, block_size, stride))


def mean_of_windows(model: nn.Module, ids: Tensor, block_size: int, stride: int) -> float:
    total, count = 0.0, 0
    for losses in losses_of_windows(model, ids, block_size, stride):
        total, count = total + float(losses.sum()), count + losses.numel()
    return total / count


def losses_of_windows(model: nn.Module, ids: Tensor, block_size: int, stride: int) -> list[Tensor]:
    """The losses of the targets of each window that no window before it has."""
    found, done = [], 1
    for start in range(0, len(ids) - 1, stride):
        end = min(start + block_size, len(ids) - 1)
        losses = F.cross_entropy(model(ids[None, start:end])[0], ids[start + 1 : end + 1], reduction="none")
        if end + 1 > done:
            found.append(losses[-(end + 1 - max(done, start + 1)) :])
        done = max(done, end + 1)
    return found


# -- losses of answers


def sum_of_log_probabilities(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """[B]; the mask [B, T] is 1 for tokens of the answer."""
    found: Tensor = model(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (found * mask[:, 1:]).sum(-1)


def dpo_loss(
    policy: nn.Module,
    reference: nn.Module,
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float = 0.1,
) -> Tensor:
    margin = sum_of_log_probabilities(policy, chosen, chosen_mask) - sum_of_log_probabilities(
        policy, rejected, rejected_mask
    )
    with torch.no_grad():
        base = sum_of_log_probabilities(reference, chosen, chosen_mask)
        base = base - sum_of_log_probabilities(reference, rejected, rejected_mask)
    return -F.logsigmoid(beta * (margin - base)).mean()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float = 2.0) -> Tensor:
    """The divergence of the student from the teacher, a mean over the places [B, T] that the mask keeps."""
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach() / temperature).log_softmax(-1)
    apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (apart * mask).sum() / mask.sum()


KINDS: dict[str, Any] = {
    "evaluation": perplexity,
    "preference loss": dpo_loss,
    "distillation loss": distillation_loss,
}
