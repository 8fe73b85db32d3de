"""Shared weights: which parameters have several names, and which only look as if they were shared."""

from __future__ import annotations

import re

from torch import nn

from ..expect import fail
from ..subject import Subject
from .module_state import settings

DECLARED = re.compile(
    r"tied?|tying|(tied?|tying|shared?)_(word_)?(embeddings?|embs?|weights?|head)|weight_(tying|sharing)"
)


def ties(model: nn.Module) -> list[list[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def expect_declared_tie(subject: Subject, model: nn.Module) -> None:
    """Where a configuration says that the head shares the embedding, a matrix with a row for each symbol is shared."""
    V = subject.sizes.vocab_size
    tables = [name for name, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2 and V in p.shape]
    says = [name for name, value in settings(model) if value is True and DECLARED.fullmatch(name.rpartition(".")[2])]
    shared = {name for names in ties(model) for name in names}
    if says and len(tables) > 1 and not shared.intersection(tables):
        fail(
            f"{says[0]} is true, but {' and '.join(tables)} are parameters of their own: the head shares no embedding",
            likely=("tied-weights-broken",),
            advice="self.head.weight = self.embedding.weight, after both exist and before the optimizer is made.",
            names=tables,
        )


def expect_no_twins(model: nn.Module) -> None:
    """No two parameters over one storage: each has its own gradient, and both are stepped and decayed."""
    held: dict[tuple, str] = {}
    for name, parameter in model.named_parameters():
        key = (parameter.data_ptr(), tuple(parameter.shape), parameter.stride())
        if parameter.numel() and key in held:
            fail(
                f"{held[key]} and {name} are two parameters over one storage: an optimizer steps and decays it twice",
                likely=("tie-by-storage",),
                advice="Assign the parameter itself (head.weight = embedding.weight), never its .data.",
                names=[held[key], name],
            )
        held[key] = name
