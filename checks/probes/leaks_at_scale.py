"""Leaks in a model too large to try every id and every pair of positions in: two searches that cost little.

What attention sees at full length is read in one forward; what happens to one id alone before and after the blocks is
tried for every id with the blocks left out. What either suspects is confirmed in the whole model, as any leak is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import note
from ..subject import Subject
from ..watch.attention import LaterKeys
from ..watch.calls import recorded
from ..ways import EVAL, Way
from .ablation import Forward, blocks_of, replaced
from .influence import Changes, call, cuts, moved, some_of, tokens_at_once
from .leak_search import LeakSearch
from .leaks import expect_no_leak
from .long import telling_places

CUTS = 2  # in a long sequence, whatever they cost
ROW = 4  # tokens of a row in which one id is tried, at place 2: as short as has a past and a future
SUSPECTS = 4  # rows that the whole model reads


def expect_no_leak_farther_on(subject: Subject, model: nn.Module, T: int, tried: int) -> None:
    """Up to T tokens, which a model of fixed size reads: what every attention sees, then cuts beyond those `tried`.

    A single pair of positions shows in what attention sees; outside attention, only if a cut lies between the two.
    """
    later = LaterKeys(T)
    late = [place for place in telling_places(T) if place > tried]
    _expect_no_leak_at(subject, model, T, late, Way(EVAL.name, inside=lambda: later))
    seen = later.pairs.any(dim=0).nonzero().flatten().tolist()
    note(farthest=T, attention_sees_later_keys=bool(seen))
    if seen:
        _expect_no_leak_at(subject, model, T, seen, EVAL)


def _expect_no_leak_at(subject: Subject, model: nn.Module, T: int, places: list[int], way: Way) -> None:
    few = some_of(places, subject.affordable(2 * T, len(places), least=CUTS), seed=subject.seed)
    note(cuts=few)
    expect_no_leak(LeakSearch(subject, model, cuts(subject, T, few), way), likely=("causal-hardcoded-length",))


def expect_no_leak_of_one_id(subject: Subject, model: nn.Module) -> None:
    """Every id, before and after the blocks, where ids are told apart; inside them only those of the sample are."""
    first, head = blocks_of(model), _head(subject, model)
    if not first or head is None:
        note(every_id="not looked at: the blocks or the head were not found")
        return
    suspects = None
    with _without_blocks(model, first, head, subject.width) as states:
        for plain, changed in _one_id_a_row(subject):
            before, after = (_states(subject, model, tokens, states) for tokens in (plain, changed))
            if before is None or after is None or before.shape[:2] != plain.shape:
                note(every_id="not looked at: the model does not run without its blocks")
                return
            hits = moved(before, after)[:, : ROW // 2].any(dim=1).nonzero().flatten()[:SUSPECTS]
            if len(hits):
                place = torch.full((len(hits),), ROW // 2, device=plain.device)
                suspects = Changes(plain[hits], changed[hits], place, stacked=tokens_at_once(subject))
                break
    note(every_id=f"all {subject.sizes.vocab_size}, with the blocks left out")
    if suspects is not None:
        expect_no_leak(LeakSearch(subject, model, suspects))


def _one_id_a_row(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows [n, ROW] that differ in one token, so that every id is once the one and once the other."""
    V, rows = subject.sizes.vocab_size, max(tokens_at_once(subject) // ROW, 1)
    generator = torch.Generator().manual_seed(subject.seed)
    for ids in torch.split(torch.randperm(V, generator=generator), rows):
        plain = torch.randint(V, (len(ids), ROW), generator=generator)
        plain[:, ROW // 2] = ids
        changed = plain.clone()
        changed[:, ROW // 2] = (ids + 1) % V
        yield plain.to(subject.device), changed.to(subject.device)


def _head(subject: Subject, model: nn.Module) -> str | None:
    """The last module that makes a vector as wide as the vocabulary from one that is not."""
    with recorded(model) as calls:
        call(subject, model, subject.tokens(1, ROW, seed=subject.seed))
    wide = [
        done.module
        for done in calls
        if isinstance(done.result, Tensor) and done.result.shape[-1] == subject.width
        if len(done.inputs) == 1 and done.inputs[0].shape[-1] != subject.width
    ]
    return wide[-1] if wide else None


@contextmanager
def _without_blocks(model: nn.Module, blocks: list[str], head: str, width: int) -> Iterator[list[Tensor]]:
    """The model with each block handing on what it got, and what would have entered the head; its logits are 0."""
    states: list[Tensor] = []

    def hand_on(forward: Forward) -> Callable[..., Any]:
        return lambda *args, **kwargs: args[0] if args else next(iter(kwargs.values()))

    def keep(forward: Forward) -> Callable[..., Any]:
        def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            states.append(x)
            return x.new_zeros(1).expand(*x.shape[:-1], width)

        return kept

    with ExitStack() as stack:
        for name in blocks:
            stack.enter_context(replaced(model.get_submodule(name), hand_on))
        stack.enter_context(replaced(model.get_submodule(head), keep))
        yield states


def _states(subject: Subject, model: nn.Module, tokens: Tensor, states: list[Tensor]) -> Tensor | None:
    """What would have entered the head [B, T, C]; None if the model does not run so."""
    states.clear()
    try:
        call(subject, model, tokens)
    except Exception:  # whatever a foreign model raises without its blocks
        return None
    return states[-1] if states and states[-1].dim() == 3 else None
