"""Ids that part a text into documents: tokens after one see nothing of what stands before it."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..expect import Where, advise, fail, shown
from ..subject import Subject
from .influence import call, moved, some_of
from .module_state import settings
from .precision import shared

LONG, AT = 5, 2  # tokens of a text, and where in it an id is tried
DRAWS = 6  # texts in which an id must part what stands before it from what follows
ENDS = re.compile(r"(^|_)(eos|eot|eod|end|sep|stop|endoftext)(_|$)", re.IGNORECASE)
BEGINS = re.compile(r"(^|_)(bos|bod|sos|begin|start|cls)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Parting:
    """An id that parts documents, and whether it sees the one before: it ends that one, or else it begins the next."""

    id: int
    ends: bool
    names: tuple[str, ...]  # of the settings and constants that hold it


def partings(subject: Subject) -> tuple[Parting, ...]:
    """Every id that parts documents, found by trying; of a large vocabulary, those named as such and a sample."""
    return subject.once(_find)


def undivided(subject: Subject, tokens: Tensor) -> Tensor:
    """The tokens with another id wherever one stands that parts documents."""
    ids = [parting.id for parting in partings(subject)]
    return _without(tokens, ids, subject.sizes.vocab_size) if ids else tokens


def _find(subject: Subject, /) -> tuple[Parting, ...]:
    V = subject.sizes.vocab_size
    if subject.sizes.block_size < LONG or V < 4:
        return ()
    model = shared(subject)
    named = _named(subject, model)
    tried = subject.affordable(2 * LONG * DRAWS, V, least=min(V, 8))
    ids = sorted({*some_of(list(range(V)), tried, seed=subject.seed), *named})
    found = _parted(subject, model, ids, avoided=[])
    if len(found) > len(ids) // 2:  # a window, or no past at all
        return ()
    confirmed = _parted(subject, model, list(found), avoided=list(found)) if found else {}
    return tuple(Parting(id, ends, tuple(named.get(id, ()))) for id, ends in confirmed.items())


def _parted(subject: Subject, model: nn.Module, ids: list[int], avoided: list[int]) -> dict[int, bool]:
    """Of these ids, those that hide what stands before them from all that follows, and whether they see it."""
    V, rows = subject.sizes.vocab_size, len(ids) * DRAWS
    here = torch.tensor(ids, device=subject.device).repeat(DRAWS)
    plain = _without(subject.tokens(rows, LONG, seed=subject.seed), avoided, V)
    plain = torch.where(plain == here[:, None], _without((plain + 1) % V, avoided, V), plain)
    plain[:, AT] = here
    changed = plain.clone()
    for _ in range(len(avoided) + 2):  # to another id, which parts nothing
        barred = torch.stack((plain[:, 0], here, *(torch.full_like(here, id) for id in avoided)))
        changed[:, 0] = torch.where((changed[:, 0] == barred).any(dim=0), (changed[:, 0] + 1) % V, changed[:, 0])
    moves = moved(call(subject, model, plain), call(subject, model, changed)).view(DRAWS, len(ids), LONG)
    hidden = (moves[:, :, AT + 1 :] == 0).all(dim=2).all(dim=0) & (moves[:, :, 0] > 0).all(dim=0)
    return {id: bool((moves[:, i, AT] > 0).any()) for i, id in enumerate(ids) if hidden[i]}


def _without(tokens: Tensor, ids: list[int], V: int) -> Tensor:
    """The tokens with the next other id in place of each of these."""
    other = torch.arange(V, device=tokens.device)
    for _ in ids:
        other = torch.where(torch.isin(other, torch.tensor(ids, device=tokens.device)), (other + 1) % V, other)
    return other[tokens]


def _named(subject: Subject, model: nn.Module) -> dict[int, list[str]]:
    """Ids that the model's settings, or constants of its code, call an end or a beginning."""
    found: dict[int, list[str]] = {}
    constants = (
        (target.id, node.value.value)
        for _, nodes in subject.code()
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    )
    for name, value in (*settings(model), *constants):
        last = name.rpartition(".")[2]
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and 0 <= value < subject.sizes.vocab_size and (ENDS.search(last) or BEGINS.search(last)):
            found.setdefault(value, []).append(name)
    return found


def expect_each_in_its_document(subject: Subject) -> None:
    """An id called an end must see the document that it ends; one called a beginning must see nothing before it."""
    for parting in partings(subject):
        last = {name.rpartition(".")[2]: name for name in parting.names}
        ends = [name for short, name in last.items() if ENDS.search(short)]
        begins = [name for short, name in last.items() if BEGINS.search(short)]
        if ends and not begins and not parting.ends:
            fail(
                f"the end token, id {parting.id} ({ends[0]}), is counted to the next document: at its own position no "
                "earlier token changes the logits, so it sees nothing of the document that it ends",
                where=_read_at(subject, ends[0]),
                likely=("end-token-in-next-document",),
                advice="An end belongs to the document that it ends: document = ends.cumsum(1) - ends.",
                id=parting.id,
            )
        if begins and not ends and parting.ends:
            fail(
                f"the begin token, id {parting.id} ({begins[0]}), is counted to the document before it: it sees that "
                "one, and the tokens after it do not see it",
                where=_read_at(subject, begins[0]),
                advice="A beginning belongs to the document that it begins: document = begins.cumsum(1).",
                id=parting.id,
            )
        if not ends + begins:
            side = "sees what stands before it" if parting.ends else "sees nothing of what stands before it"
            advise(
                f"id {parting.id} parts documents: tokens after it see nothing before it. It {side}; is it so meant?"
            )


def _read_at(subject: Subject, name: str) -> Where | None:
    """The first line that compares something with the setting or constant."""
    last = name.rpartition(".")[2]
    for file, nodes in subject.code():
        for node in nodes:
            inside = ast.walk(node) if isinstance(node, ast.Compare) else ()
            if isinstance(node, ast.Compare) and last in {getattr(n, "attr", getattr(n, "id", "")) for n in inside}:
                return Where("forward", "", shown(file), node.lineno)
    return None
