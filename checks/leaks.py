"""What is said of a token that changes the logits before it: the first pair, the module, and what the pattern means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from checks.ablation import passed_by, replaced, siblings
from checks.expect import Bound, Where, fail
from checks.influence import EVAL, Changes, Leak, Way, call, find_leak
from checks.precision import spread

ADVICE = (
    "Print the causal mask that reaches attention (row t is True at columns 0 to t only), then the same in every layer "
    "and on every path: train and eval, with and without a padding mask."
)
FAINT = 1e-2  # of what the past does: a fill that is not negative enough leaks less than no mask at all


def expect_no_leak(
    subject: Any,
    model: nn.Module,
    tried: Changes,
    way: Way = EVAL,
    *,
    bound: Bound | None = None,
    exact: bool = True,
    alone: bool = False,
    likely: tuple[str, ...] = (),
) -> Tensor:
    """Fails with the first leaking pair, else returns how far every change moved every position [N, T]."""
    leak, moves = find_leak(subject, model, tried, way, bound=bound, exact=exact, alone=alone)
    if leak is None:
        return moves
    unit = spread(call(subject, model, leak.tried.plain, leak.tried.mask, way))
    where = leak.site(subject, model)
    pairs = leak.pairs > 0
    causes = (*likely, *depth(subject, model, leak, where), *pattern(leak.pairs, moves))
    fail(
        _sentence(leak, unit, int(pairs.sum())),
        where=where,
        likely=tuple(dict.fromkeys(causes)),
        advice=ADVICE,
        first={"t": leak.t, "s": leak.s},
        length=leak.length,
        size=_short(leak.size / unit),
        bound=leak.bound.size / unit,
        leaking_pairs=[[int(t), int(s)] for t, s in pairs.nonzero()[:40]],
        influence=in_deviations(leak.pairs, unit),
        tokens=leak.tried.plain[leak.row].tolist(),
        changed=leak.tried.changed[leak.row].tolist(),
        mask=None if leak.tried.mask is None else leak.tried.mask[leak.row].tolist(),
    )


def _sentence(leak: Leak, unit: float, pairs: int) -> str:
    T, rows = leak.length, len(leak.tried.place)
    new = (leak.tried.plain[leak.row] != leak.tried.changed[leak.row]).nonzero()
    what = f"token {leak.s} changes" if len(new) == 1 else f"rewriting the tokens from {leak.s} on changes"
    tokens = f"{T} tokens" if leak.tried.mask is None else f"{int(leak.tried.mask[leak.row].sum())} real tokens of {T}"
    batch = "" if rows == 1 else f", row {leak.row} of {rows} (a row alone is clean)"
    return (
        f"{what} the logits at position {leak.t}, before it: a leak from the future, of "
        f"{leak.size / unit:.3g} standard deviations of the logits, where {leak.bound.size / unit:.1e} "
        f"({leak.bound.because}) is allowed; {leak.way.name}, {tokens}{batch}; {pairs} of {T * (T - 1) // 2} pairs leak"
    )


def in_deviations(pairs: Tensor, unit: float) -> list[list[float]]:
    """Row t, column s: how far token s moves the logits at t, in standard deviations of the logits."""
    return [[_short(float(x) / unit) for x in row] for row in pairs]


def _short(x: float) -> float:
    return float(f"{x:.3g}")


def pattern(pairs: Tensor, moves: Tensor) -> tuple[str, ...]:
    """Known bugs that leak in this pattern of pairs [T, T], row t, column s; the most likely first."""
    T = len(pairs)
    leaks, (t, s) = pairs > 0, (pairs > 0).nonzero(as_tuple=True)
    full = bool(leaks.triu(1).sum() == T * (T - 1) // 2)
    if int(t.max()) == 0 and T > 2:
        return ("causal-excludes-self", "fully-masked-row-uniform")
    if full and float(pairs.max()) < FAINT * float(moves.max()):
        return ("mask-fill-not-negative-enough", "bool-mask-added-as-float", "no-causal-mask")
    if full:
        return ("no-causal-mask", "mask-multiplied-after-softmax", "softmax-over-queries", "bool-mask-added-as-float")
    if int((s - t).max()) <= 2 < T - 1:
        return ("causal-sees-one-future", "window-sign-error")
    if any(bool((t // size == s // size).all()) for size in range(2, (T + 1) // 2 + 1)):
        return ("block-summary-leak", "causal-sees-one-future")
    if int(s.min()) > 2:
        return ("causal-hardcoded-length",)
    return ("heads-view-without-transpose", "merge-heads-without-transpose", "mask-multiplied-after-softmax")


def depth(subject: Any, model: nn.Module, leak: Leak, where: Where | None) -> tuple[str, ...]:
    """Whether the leak is gone once the block that shows it first is passed by: then the other blocks are right."""
    blocks = next(iter(siblings(model)), [])
    culprit = [name for name in blocks if where is not None and f"{where.module}.".startswith(f"{name}.")]
    if not culprit:
        return ()
    tried = leak.tried
    with replaced(model.get_submodule(culprit[0]), passed_by):
        plain, changed = (call(subject, model, x, tried.mask, leak.way) for x in (leak.tried.plain, leak.tried.changed))
    clean = torch.equal(plain[leak.row, : leak.s], changed[leak.row, : leak.s])
    return ("causal-mask-wrong-in-some-layers",) if clean else ()
