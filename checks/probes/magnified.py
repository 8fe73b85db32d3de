"""A model with weights so large that scores of thousands stand against whatever fills the masked ones."""

from __future__ import annotations

import torch
from torch import nn

from ..subject import Subject
from ..watch.attention import LargestScore
from .influence import call, every_id, length
from .precision import precise, spread

EXTREME = 20  # times every weight
REACH = 1e6  # of the logits' spread: beyond it, without norms, scores reach any finite fill, however right
SCORES = 1e8  # of scores: masks are filled with -1e9


def magnified(subject: Subject) -> nn.Module:
    """Weights so large that scores of thousands stand against whatever fills the masked ones."""
    model = precise(subject)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(EXTREME)
    return model


def within_reach(subject: Subject, model: nn.Module) -> bool:
    """Whether magnified weights still say something about a mask: not where scores reach the largest usual fill."""
    with LargestScore() as score:
        logits = call(subject, model, every_id(subject, length(subject), seed=subject.seed))
    return bool(logits.isfinite().all()) and spread(logits) <= REACH and score.size <= SCORES
