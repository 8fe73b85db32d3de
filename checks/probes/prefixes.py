"""Whether a text's first tokens get the logits they get alone, and the length from which a model declares otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..expect import Bound, advise, expect_close, farthest
from .module_state import settings
from .windows import is_size

OF_LENGTH = re.compile(r"len|position|context|ctx|seq|block")  # in what a model calls the length it was trained on

Run = Callable[[Tensor], Tensor]  # tokens [B, T] to logits [B, T, V]


def expect_prefixes_agree(
    model: nn.Module,
    run: Run,
    tokens: Tensor,
    lengths: Sequence[int],
    bound: Callable[[Tensor], Bound],
    *,
    whole: Tensor | None = None,
    where: str = "",
    likely: tuple[str, ...],
    advice: str,
) -> float:
    """Fails unless the first t tokens have the same logits alone as with the rest. Returns the largest difference.

    `whole`, if at hand: the logits [B, T, V] of all tokens.

    A model whose rotary base grows with the length (dynamic NTK) declares a length up to which it does not: there it is
    judged up to that length.
    """
    T, margin = tokens.shape[1], 0.0
    whole = run(tokens) if whole is None else whole
    allowed = bound(whole)
    for t in (t for t in lengths if t <= T):
        got = run(tokens[:, :t].contiguous())
        apart = farthest(got, whole[:, :t])
        if apart > allowed.size and (trained := trained_length(model, run, tokens, allowed)) is not None:
            name, n = trained
            advise(
                f"beyond {n} tokens ({name}) all logits depend on the length of the text, as with rotary frequencies "
                f"that are rescaled for longer texts; up to {n} they do not"
            )
            shorter = [t for t in lengths if t <= n]
            return expect_prefixes_agree(
                model, run, tokens[:, :n].contiguous(), shorter, bound, where=where, likely=likely, advice=advice
            )
        margin = max(margin, apart)
        expect_close(
            got,
            whole[:, :t],
            bound=allowed,
            says=f"the first {t} of {T} tokens have different logits when read alone than when read with the rest"
            + where,
            likely=likely,
            advice=advice,
            length=t,
        )
    return margin


def trained_length(model: nn.Module, run: Run, tokens: Tensor, allowed: Bound) -> tuple[str, int] | None:
    """The declared length, by its name, up to which prefixes agree and at once beyond which they do not."""
    T = tokens.shape[1]
    declared = {
        value: name
        for name, value in settings(model)
        if is_size(value) and 2 <= value < T and OF_LENGTH.search(name.rpartition(".")[2])
    }
    for n, name in sorted(declared.items()):
        within = run(tokens[:, :n].contiguous())
        alike = all(
            farthest(run(tokens[:, :t].contiguous()), within[:, :t]) <= allowed.size for t in range(max(2, n - 8), n)
        )
        beyond = run(tokens[:, : n + 1].contiguous())[:, :n]
        if alike and farthest(beyond, within) > allowed.size:
            return name, n
    return None
