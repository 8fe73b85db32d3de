"""Next-token cross entropy under a loss mask: which targets count, their sum, their mean.

Targets are aligned with the logits: targets[b, t] is the token that follows tokens[b, t]. Nothing is shifted here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MASKED = torch.iinfo(torch.int64).min  # never a target by accident, as -1 or -100 might be


def loss_mask(real: Tensor, skip: int = 0) -> Tensor:
    """[B, T] bool, True where a target carries loss.

    The first `skip` targets of a row carry no loss, padding carries none. `real` [B, T] is True where the target is a
    token of the row; the first targets are counted among these, so that padding may stand on either side.
    """
    if skip < 0:
        raise ValueError(f"skip must be at least 0, got {skip}")
    real = real.bool()
    return real & (real.cumsum(dim=1) > skip)


def next_token_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy (nats per target) over the targets that `mask` [B, T] keeps; without a mask, over all.

    logits [B, T, V], targets [B, T]. If no target is kept, the loss and all gradients are 0.
    Raises ValueError for shapes that do not fit and for a kept target outside the vocabulary.
    """
    total, count = loss_sum(logits, targets, mask)
    return total / count.clamp(min=1)


def loss_sum(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the kept targets, and their number: both add up over micro-batches, which means do not.

    In float32 at least, whatever the dtype of the logits.
    """
    check_shapes(logits, targets, mask)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        return cross_entropy(logits, targets), torch.full((), targets.numel(), device=targets.device)
    mask = mask.bool()
    return cross_entropy(drop_masked(logits, mask), targets.masked_fill(~mask, MASKED)), mask.sum()


def drop_masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Replaces logits that carry no loss before the softmax: a NaN there would make the gradient NaN."""
    return logits.masked_fill(~mask[..., None], 0.0)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over the targets that are not MASKED."""
    try:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=MASKED, reduction="sum")
    except IndexError:
        V = logits.shape[-1]
        bad = targets[(targets != MASKED) & ((targets < 0) | (targets >= V))][0]
        raise ValueError(
            f"target {int(bad)} is outside the vocabulary: 0 to {V - 1}. Mask the targets that carry no loss."
        ) from None


def check_shapes(logits: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"expected logits [B, T, V] and targets [B, T], got {list(logits.shape)} and {list(targets.shape)}"
        )
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"expected a loss mask of the targets' shape {list(targets.shape)}, got {list(mask.shape)}")
