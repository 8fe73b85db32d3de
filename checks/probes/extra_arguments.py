"""Arguments of a forward other than tokens and a padding mask: positions, document ids, targets."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ..meet import roles
from ..meet.arguments import Parameter
from ..subject import Subject

POSITIONS = re.compile(r"(input_?)?pos(ition)?(_?ids?|s)?|token_positions")
DOCUMENTS = re.compile(r"(doc|document|segment|sequence|seq)s?(_ids?)?")


def taken(subject: Subject, named: re.Pattern[str]) -> inspect.Parameter | None:
    """The first parameter of the model's forward with such a name, after the one that takes the tokens."""
    try:
        _tokens, *parameters = inspect.signature(subject.build(seed=subject.seed).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    return next((parameter for parameter in parameters if named.fullmatch(parameter.name)), None)


def targets_of(subject: Subject) -> Parameter | None:
    """The parameter of the model's forward that takes targets for a loss."""
    return subject.once(_targets)


def _targets(subject: Subject) -> Parameter | None:
    tokens = subject.tokens(3, min(7, subject.sizes.block_size), seed=subject.seed)
    with subject.running():
        return roles.targets_of(subject.build(seed=subject.seed), tokens, subject.sizes.vocab_size)


def beside_tokens(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Tensor]]:
    """By name, what may be passed with tokens [B, T]: positions in two shapes, document ids, targets."""
    every = torch.arange(tokens.shape[1], device=tokens.device)
    positions, one_document = every.expand_as(tokens), torch.zeros_like(tokens)
    forms = (POSITIONS, positions), (POSITIONS, every), (DOCUMENTS, one_document)
    for named, value in forms:
        if (parameter := taken(subject, named)) is not None:
            yield parameter.name, value.contiguous()
    if (targets := targets_of(subject)) is not None:
        yield targets.name, tokens.roll(-1, dims=1)
