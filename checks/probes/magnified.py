"""A model with weights so large that its attention scores reach thousands, more than a weak mask fill outweighs."""

from __future__ import annotations

import torch
from torch import nn

from ..subject import Subject
from ..watch.attention import LargestScore
from .influence import call, every_id, length
from .precision import precise, spread

EXTREME = 20  # times every weight
REACH = 1e6  # largest spread of logits: beyond it, without norms, scores exceed even a correct finite fill
SCORES = 1e8  # largest score: masks are filled with -1e9


def magnified(subject: Subject) -> nn.Module:
    """Every weight times EXTREME: attention scores reach thousands, and a weak mask fill leaks."""
    model = precise(subject)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(EXTREME)
    return model


def within_reach(subject: Subject, model: nn.Module) -> bool:
    """Whether the magnified model can be judged: not if logits overflow or scores reach the largest usual fill."""
    with LargestScore() as score:
        logits = call(subject, model, every_id(subject, length(subject), seed=subject.seed))
    return bool(logits.isfinite().all()) and spread(logits) <= REACH and score.size <= SCORES
