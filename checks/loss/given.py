"""What a model gives its loss: logits, log-probabilities or probabilities, and where its code makes a loss of them."""

from __future__ import annotations

import ast

import torch

from ..expect import Where, shown
from ..meet.logits import standing_for
from ..subject import Subject

OF_LOGITS = {"CrossEntropyLoss", "cross_entropy"}


def gives(subject: Subject) -> str:
    """What stands for logits: "logits", "log-probabilities" or "probabilities"."""
    with torch.no_grad():
        return standing_for(subject.logits(subject.build(), subject.tokens(2, min(5, subject.sizes.block_size))))


def cross_entropy_line(subject: Subject) -> Where | None:
    """The line of the subject's code that names PyTorch's cross entropy, which takes logits.

    None where there is none, or where a logarithm is taken by hand: probabilities may then be meant.
    """
    found: Where | None = None
    for filename, nodes in subject.code():
        for node in nodes:
            word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if word in ("log", "nll_loss", "NLLLoss"):
                return None
            if word in OF_LOGITS and found is None:
                found = Where(word, "", shown(filename), node.lineno)
    return found
