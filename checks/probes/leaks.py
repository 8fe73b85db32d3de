"""The finding of a leak: the first pair of positions, the module, and the known bugs with this pattern of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expect import Where, fail
from ..watch.attention import Attentions
from ..watch.norms import NAMED
from .ablation import blocks_of, passed_by, replaced
from .experts import ROUTED, expect_room, router_suspects
from .influence import in_deviations, measure
from .leak_search import Leak, LeakSearch
from .precision import spread

ADVICE = (
    "Print the causal mask that reaches attention: row t must be True at columns 0 to t only. Then compare every layer "
    "and every path: train and eval, with and without a padding mask."
)
FILLED = (
    "Fill masked scores with float('-inf') or torch.finfo(scores.dtype).min: a large score can exceed any other number."
)
NORMED = "Normalize over the features of each token (dim=-1): a mean over time includes later tokens."
LEFT_OUT = "Make the causal mask in forward where {0} is None; or give {0} no default, so that nobody can forget it."
FAINT = 1e-2  # of what the past does: a fill that is not negative enough leaks less than no mask at all


def expect_no_leak(search: LeakSearch, *, likely: tuple[str, ...] = ()) -> Tensor:
    """Fails with the first leaking pair, else returns how far every change moved every position [N, T]."""
    leak, moves = search.find()
    if leak is None:
        return moves
    unit = spread(leak.plain())
    where = leak.site()
    pairs = leak.pairs > 0
    seen, causes = attention_seen(leak)
    expect_room(search.subject, search.model, leak.tried.plain, search.way, where)
    in_a_norm = where is not None and bool(NAMED.search(where.type))
    routed = router_suspects(search.model, where)
    likely = ("norm-over-sequence", *likely) if in_a_norm else (*routed, *likely)
    causes = (*likely, *depth(leak, where), *causes, *pattern(leak.pairs, moves))
    advice = NORMED if in_a_norm else ROUTED if routed else FILLED if causes[0].startswith("mask-fill") else ADVICE
    if name := search.subject.mask_left_out:
        seen = f"It does not when {name} is given a causal mask, but forward does without one, as its callers do"
        causes, advice = ("no-causal-mask", *causes), LEFT_OUT.format(name)
    fail(
        f"{_sentence(leak, unit, int(pairs.sum()))}{f'. {seen}' if seen else ''}",
        where=where,
        likely=tuple(dict.fromkeys(causes)),
        advice=advice,
        first={"t": leak.t, "s": leak.s},
        length=leak.length,
        size=float(f"{leak.size / unit:.3g}"),
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
    what = f"changing token {leak.s} changes" if len(new) == 1 else f"rewriting the tokens from {leak.s} on changes"
    tokens = f"{T} tokens" if leak.tried.mask is None else f"{int(leak.tried.mask[leak.row].sum())} real tokens of {T}"
    batch = "" if rows == 1 else f", row {leak.row} of {rows} (no leak when this row is read alone)"
    allowed = f"{leak.bound.size / unit:.0e}" if leak.bound.size else str(leak.bound)
    return (
        f"position {leak.t} sees the future: {what} its logits by {leak.size / unit:.3g} standard deviations, allowed "
        f"{allowed}; {leak.search.way.name}, {tokens}{batch}; {pairs} of {T * (T - 1) // 2} pairs of positions leak"
    )


def pattern(pairs: Tensor, moves: Tensor) -> tuple[str, ...]:
    """Known bugs with this pattern of leaking pairs [T, T], row t, column s; the most likely first."""
    T, (t, s) = len(pairs), (pairs > 0).nonzero(as_tuple=True)
    full, farthest = len(t) == T * (T - 1) // 2, int((s - t).max())
    if int(t.max()) == 0 and T > 2:
        return ("causal-excludes-self",)
    if full and float(pairs.max()) < FAINT * float(moves.max()):
        return ("mask-fill-not-negative-enough", "bool-mask-added-as-float", "no-causal-mask")
    if full:
        return ("no-causal-mask", "mask-multiplied-after-softmax", "softmax-over-queries", "bool-mask-added-as-float")
    if farthest <= 2 < T - 1:
        return ("causal-sees-one-future", "look-ahead-shift", "one-position-leaks")
    if in_groups(t, s, T):
        return ("block-summary-leak", "causal-sees-one-future")
    if farthest < T - 1 and len(t) == sum(T - d for d in range(1, farthest + 1)):
        return ("window-to-both-sides", "window-sign-error")
    if int(s.min()) > 2:
        return ("causal-hardcoded-length",)
    return ("heads-view-without-transpose", "merge-heads-without-transpose", "gqa-repeat-on-sequence-dim")


def outside(pairs: Tensor) -> tuple[str, ...]:
    """Known bugs with this pattern of leaking pairs although attention looks at the past only."""
    t, s = (pairs > 0).nonzero(as_tuple=True)
    if int((s - t).max()) <= 2 < len(pairs) - 1:
        return ("look-ahead-shift",)
    if in_groups(t, s, len(pairs)):
        return ("block-summary-leak",)
    return ("merge-heads-without-transpose", "heads-view-without-transpose", "gqa-repeat-on-sequence-dim")


def in_groups(t: Tensor, s: Tensor, T: int) -> bool:
    """Whether every pair is inside one group of 2, 3, … neighbours."""
    return any(bool((t // size == s // size).all()) for size in range(2, (T + 1) // 2 + 1))


def depth(leak: Leak, where: Where | None) -> tuple[str, ...]:
    """The bug of some layers only, if nothing leaks once the block that leaks first is passed by."""
    model, tried = leak.search.model, leak.search.tried
    culprit = [name for name in blocks_of(model) if where is not None and f"{where.module}.".startswith(f"{name}.")]
    if not culprit:
        return ()
    with replaced(model.get_submodule(culprit[0]), passed_by):
        moves = measure(leak.search.subject, model, tried, leak.search.way)
    clean = not bool(torch.where(tried.judged(), moves, 0.0).any())
    return ("causal-mask-wrong-in-some-layers",) if clean else ()


def attention_seen(leak: Leak) -> tuple[str, tuple[str, ...]]:
    """What the first attention that lets the future in did, and the bugs that do so."""
    with Attentions(leak.length) as attentions:
        leak.plain()
    opened = next((seen for seen in attentions.found if seen.causes), None)
    if opened is not None:
        return opened.says, opened.causes
    if attentions.found:
        return "Attention itself looks at the past only: the leak is before or after it", outside(leak.pairs)
    return "", ()
