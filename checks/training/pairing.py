"""What makes batches and what trains on them, as a pair: which token of the text each position is trained on."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import torch

from ..expect import NotApplicable, Where, shown
from ..loss.cases import readable
from ..meet.batches import Batch
from ..subject import Subject
from .met_step import FORMS, met_step

NEVER_TRAINS = re.compile(r"generate|sample|decode|encode|__getitem__|__init__|(get|make|pad|next)_batch|collate")
ROW = 8  # ids of each sequence that a pad_batch is given


@dataclass(frozen=True)
class Reader:
    """What takes a batch and trains on it."""

    says: str  # your loss, train_step
    shift: int  # the logits at t are trained on target t + shift

    def meaning(self, batch: Batch) -> str:
        """What the logits at a position are trained on."""
        off = (batch.shift or 0) + self.shift
        return {
            0: "the token that they have just read, so the model learns to copy its input",
            2: "the token after the next: the targets are shifted twice",
        }.get(off, f"the token {abs(off)} {'after' if off > 0 else 'before'} the one just read")


def batches(subject: Subject) -> list[Batch]:
    """One batch of everything that makes batches. Raises NotApplicable if there is none that can be read."""
    pad_batch, found = subject.part("pad_batch"), subject.part("batches")
    if pad_batch is not None:
        given = torch.arange(1, 2 * ROW + 1).view(2, ROW).tolist()
        made = pad_batch(given)
        return [Batch("pad_batch", made.tokens, made.targets)]
    if found is None:
        raise NotApplicable(
            "no function that makes batches was found in your file",
            unless="a get_batch, Dataset or collate function in it",
        )
    if not (read := [batch for batch in found() if batch.shift is not None]):
        raise NotApplicable("what makes batches could not be asked for one, or its targets are no shifted tokens")
    return read


def reader(subject: Subject) -> Reader:
    """What trains on the batches: train_step, else the loss. Raises NotApplicable where that cannot be told."""
    if not subject.causal:
        raise NotApplicable("a model that is not causal need not predict the next token")
    if subject.brings("train_step"):
        met = met_step(subject)
        if met.right:
            return Reader("train_step", int(met.form == FORMS[1]))
    loss = readable(subject)
    if (line := sliced_again(subject)) is not None:
        raise NotApplicable(f"your code slices tokens or targets at {line}, between the batch and the loss")
    return Reader("the loss", loss.shift)


def sliced_again(subject: Subject) -> Where | None:
    """The first `[:, 1:]` or `[:, :-1]` in code that is no part of the model or its loss and makes no batches."""
    mine = {type(module).__name__ for module in subject.build().modules()}
    loss = getattr(subject.part("loss"), "__name__", "")
    for filename, nodes in subject.code():
        classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name in mine]
        forwards = [f for c in classes for f in c.body if isinstance(f, ast.FunctionDef) and f.name == "forward"]
        others = [
            n for n in nodes if isinstance(n, ast.FunctionDef) and (n.name == loss or NEVER_TRAINS.search(n.name))
        ]
        skipped = {id(inner) for function in (*forwards, *others) for inner in ast.walk(function)}
        for node in nodes:
            if isinstance(node, ast.Subscript) and id(node) not in skipped and _by_one(node):
                return Where(ast.unparse(node), "line", shown(filename), node.lineno)
    return None


def _by_one(node: ast.Subscript) -> bool:
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    ends = [end for part in parts if isinstance(part, ast.Slice) for end in (part.lower, part.upper) if end is not None]
    return any(ast.unparse(end) in ("1", "-1") for end in ends)
