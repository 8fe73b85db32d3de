"""What is said of a token that changes the logits before it: the first pair, the module, and what the pattern means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..expect import Bound, Where, fail
from ..subject import Subject
from ..watch.attention import Attentions
from ..watch.norms import NAMED
from .ablation import blocks_of, passed_by, replaced
from .influence import EVAL, Changes, Leak, Way, call, find_leak, measure
from .precision import spread

ADVICE = (
    "Print the causal mask that reaches attention (row t is True at columns 0 to t only), then the same in every layer "
    "and on every path: train and eval, with and without a padding mask."
)
FILLED = (
    "Fill masked scores with float('-inf'), or with torch.finfo(scores.dtype).min: a score can outgrow another number."
)
NORMED = "A norm takes its mean over the features of one token, dim=-1 alone: over time it hears every later token."
FAINT = 1e-2  # of what the past does: a fill that is not negative enough leaks less than no mask at all


def expect_no_leak(
    subject: Subject,
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
    seen, causes = attention_seen(subject, model, leak)
    in_a_norm = where is not None and bool(NAMED.search(where.type))
    likely = ("norm-over-sequence", *likely) if in_a_norm else likely
    causes = (*likely, *depth(subject, model, leak, where), *causes, *pattern(leak.pairs, moves))
    fail(
        f"{_sentence(leak, unit, int(pairs.sum()))}{f'. {seen}' if seen else ''}",
        where=where,
        likely=tuple(dict.fromkeys(causes)),
        advice=NORMED if in_a_norm else FILLED if causes[0].startswith("mask-fill") else ADVICE,
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
    what = f"changing token {leak.s} changes" if len(new) == 1 else f"rewriting the tokens from {leak.s} on changes"
    tokens = f"{T} tokens" if leak.tried.mask is None else f"{int(leak.tried.mask[leak.row].sum())} real tokens of {T}"
    batch = "" if rows == 1 else f", row {leak.row} of {rows} (alone the row is clean)"
    allowed = f"{leak.bound.size / unit:.0e}" if leak.bound.size else str(leak.bound)
    return (
        f"position {leak.t} sees the future: {what} its logits by {leak.size / unit:.3g} standard deviations, allowed "
        f"{allowed}; {leak.way.name}, {tokens}{batch}; {pairs} of {T * (T - 1) // 2} pairs of positions leak"
    )


def in_deviations(pairs: Tensor, unit: float) -> list[list[float]]:
    """Row t, column s: how far token s moves the logits at t, in standard deviations of the logits."""
    return [[_short(float(x) / unit) for x in row] for row in pairs]


def _short(x: float) -> float:
    return float(f"{x:.3g}")


def pattern(pairs: Tensor, moves: Tensor) -> tuple[str, ...]:
    """Known bugs that leak in this pattern of pairs [T, T], row t, column s; the most likely first."""
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
    """Known bugs that leak in this pattern although attention keeps to the past."""
    t, s = (pairs > 0).nonzero(as_tuple=True)
    if int((s - t).max()) <= 2 < len(pairs) - 1:
        return ("look-ahead-shift",)
    if in_groups(t, s, len(pairs)):
        return ("block-summary-leak",)
    return ("merge-heads-without-transpose", "heads-view-without-transpose", "gqa-repeat-on-sequence-dim")


def in_groups(t: Tensor, s: Tensor, T: int) -> bool:
    """Whether all pairs stay inside groups of 2, 3, … neighbours."""
    return any(bool((t // size == s // size).all()) for size in range(2, (T + 1) // 2 + 1))


def depth(subject: Subject, model: nn.Module, leak: Leak, where: Where | None) -> tuple[str, ...]:
    """Whether nothing leaks once the block that leaks first is passed by: then the other blocks are right."""
    blocks = blocks_of(model)
    culprit = [name for name in blocks if where is not None and f"{where.module}.".startswith(f"{name}.")]
    if not culprit or leak.search is None:
        return ()
    with replaced(model.get_submodule(culprit[0]), passed_by):
        moves = measure(subject, model, leak.search, leak.way)
    clean = not bool(torch.where(leak.search.judged(), moves, 0.0).any())
    return ("causal-mask-wrong-in-some-layers",) if clean else ()


def attention_seen(subject: Subject, model: nn.Module, leak: Leak) -> tuple[str, tuple[str, ...]]:
    """What the first attention that lets the future in was seen to do, and the bugs that do so."""
    with Attentions(leak.length) as attentions:
        call(subject, model, leak.tried.plain, leak.tried.mask, leak.way)
    opened = next((seen for seen in attentions.found if seen.causes), None)
    if opened is not None:
        return opened.says, opened.causes
    if attentions.found:
        return "Every attention keeps to the past: the leak is before it or behind it", outside(leak.pairs)
    return "", ()
