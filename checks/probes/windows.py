"""Sliding windows: how many tokens a model declares that a position sees, and how many it sees."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, advise, fail
from ..subject import EXISTENCE, Subject
from ..watch.location import locate
from ..ways import EVAL
from .ablation import blocks_of, left_alone
from .influence import changes, influence, length, measure
from .module_state import CONFIGURATIONS, settings
from .precision import precise

NAMED = re.compile(r"window|sliding")
ABOUT_LAYERS = re.compile(r"pattern|layer|every|interval|freq|period|ratio|type|num|count")  # which ones have a window
WINDOWS = ("window-ignored", "window-off-by-one", "window-sign-error")
PRINT_MASK = "Print the mask of each layer: row t must be True at columns t - window + 1 to t."


def declared_windows(model: nn.Module) -> dict[str, int]:
    """Every whole number above 0 that a module or its configuration calls a window, by its dotted name."""
    found = ((name, name.rpartition(".")[2], value) for name, value in settings(model))
    return {
        name: value
        for name, last, value in found
        if NAMED.search(last) and not ABOUT_LAYERS.search(last) and is_size(value)
    }


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def window(subject: Subject, model: nn.Module, T: int) -> int | None:
    """The smallest declared window that is shorter than T tokens, None without one."""
    said = subject.declared("window")
    sizes = declared_windows(model).values() if said is None else (said,)
    return min((w for w in sizes if w < T), default=None)


def in_reach(subject: Subject, model: nn.Module, T: int) -> Tensor:
    """[T, T], True where position t (row) must see token s (column): every earlier one, or those of one window."""
    size = window(subject, model, T)
    past = torch.ones(T, T, dtype=torch.bool).tril()
    return past if size is None else past.triu(1 - size)


def seen_by(subject: Subject, model: nn.Module) -> Tensor:
    """[T, T], True where position t (row) sees token s (column)."""
    tried = changes(subject, subject.tokens(2, length(subject), seed=subject.seed), alternatives=3, alone=True)
    return influence(measure(subject, model, tried, EVAL), tried.place).cpu() > 0


def reach(seen: Tensor) -> int | None:
    """How many tokens each position sees, itself among them, in a map [T, T]; None if that varies."""
    T, count = len(seen), int(seen[-1].sum())
    return count if bool(seen.eq(torch.ones(T, T, dtype=torch.bool).tril().triu(1 - count)).all()) else None


def judge_window(subject: Subject, model: nn.Module, w: int, seen: Tensor) -> None:
    """Fails a block that holds the window itself and sees, at every position, another number of tokens.

    A window that only the configuration names may be meant for other blocks.
    """
    T, count = len(seen), reach(seen)
    if count is None:
        raise NotApplicable("the number of tokens seen varies by position", window=w, seen=seen.int().tolist())
    if not _held(subject, model, w):
        advise(f"the configuration names a window of {w}, but with only one block left, it sees {count} of {T} tokens")
        return
    t, s = (int(i) for i in (seen != torch.ones(T, T, dtype=torch.bool).tril().triu(1 - w)).nonzero()[0])
    fail(
        f"one block with a window of {w} tokens: position {t} {'sees' if bool(seen[t, s]) else 'does not see'} token "
        f"{s}, {t - s} before it; the last position sees {count} tokens, expected {w} ({w + 1} if the token itself "
        "is not counted)",
        likely=WINDOWS,
        advice=PRINT_MASK,
        first={"t": t, "s": s},
        window=w,
    )


def _held(subject: Subject, model: nn.Module, size: int) -> bool:
    """Whether the subject declares this window, or a part of the model holds it."""
    if subject.declared("window") == size:
        return True
    names = [name.split(".") for name, value in declared_windows(model).items() if value == size]
    return any(len(name) > 1 and name[-2] not in CONFIGURATIONS for name in names)


def expect_layers_alike(subject: Subject, w: int) -> None:
    """Each block alone, in its place, sees as far as its own window; the majority decides whether w counts the token.

    A block with no window of its own may differ from the configuration's, unless by one token: that is no choice.
    Blocks that see the whole past pass: some designs mix global and local layers.
    """
    model = precise(subject, EXISTENCE[-1])
    names = blocks_of(model)
    over: dict[str, int] = {}  # by how many tokens a block sees more than its window
    for name in names:
        with left_alone(model, name, names):
            count = reach(seen_by(subject, model))
        own = _held_by(model.get_submodule(name))
        if count is not None and count != length(subject) and (own is not None or abs(count - w) <= 1):
            over[name] = count - (own or w)
    usual = max((0, 1), key=list(over.values()).count)
    odd = next((name for name, more in over.items() if more != usual), None)
    if odd is not None:
        own = _held_by(model.get_submodule(odd)) or w
        fail(
            f"{odd} alone sees {own + over[odd]} tokens, expected {own + usual}: its window is {own}, and the windows "
            f"of the other blocks {'count' if usual == 0 else 'do not count'} the token itself",
            where=locate(model, odd),
            likely=("window-off-by-one-in-one-layer", *WINDOWS),
            advice=PRINT_MASK,
            module=odd,
            window=own,
            over=over,
        )


def _held_by(block: nn.Module) -> int | None:
    """The one window that parts of a block hold; None if there is none, or more than one."""
    names = [(name.split("."), value) for name, value in declared_windows(block).items()]
    sizes = {value for name, value in names if len(name) < 2 or name[-2] not in CONFIGURATIONS}
    return sizes.pop() if len(sizes) == 1 else None
