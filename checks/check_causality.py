"""Changing a token must not change any earlier logit, on any path through the model, and must change later ones."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .expect import (
    CAUSAL,
    REACHES,
    STEADY,
    Bound,
    NotApplicable,
    advise,
    drawn,
    expect_same,
    fail,
    farthest,
    needs,
    note,
)
from .probes.ablation import one_block
from .probes.cached import with_cache
from .probes.documents import expect_each_in_its_document, undivided
from .probes.embeddings import jacobian_sizes, watched_embeddings
from .probes.extra_arguments import targets_of
from .probes.influence import (
    Changes,
    call,
    changes,
    cuts,
    every_id,
    in_deviations,
    influence,
    length,
    lengths,
    measure,
    tried_at,
)
from .probes.leak_search import LeakSearch
from .probes.leaks import expect_no_leak
from .probes.leaks_at_scale import expect_no_leak_farther_on, expect_no_leak_of_one_id
from .probes.long import LONG, LONGER, telling_places
from .probes.magnified import EXTREME, magnified, within_reach
from .probes.padding import SIDES, ragged
from .probes.precision import precise, precision, shared, spread
from .probes.preconditions import expect_causal, expect_takes_mask
from .probes.prefixes import expect_prefixes_agree
from .probes.windows import declared_windows, expect_layers_alike, in_reach, judge_window, reach, seen_by, window
from .subject import EXISTENCE, Subject
from .watch.arithmetic import operations_of
from .watch.calls import first_breaking
from .ways import (
    CACHED,
    EVAL,
    PLAIN_KERNEL,
    TRAIN,
    WITHOUT_FUSED,
    Way,
    autocast_to_bfloat16,
    computed_in,
    training_with,
    without_fused_attention,
)

DROPOUT = 0.2
FARTHEST = 1031  # beyond the last length at which masks commonly end; two cuts put every pair on both sides of one
LONGEST_TRIED = 1024
UNSEEN = 1e-9  # of the largest move; anything smaller is rounding, although one token among many moves little
SEEN = 1e-3  # standard deviations of the logits: a token in reach must move them by more (clean models: 0.018)


@needs(*STEADY)
def check_future_cannot_change_past(subject: Subject) -> None:
    """Changing a token must not change any earlier logit, at any length and for any pair of positions."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tried = changes(subject, every_id(subject, T, seed=subject.seed))
    moves = expect_no_leak(LeakSearch(subject, model, tried))
    pairs = influence(moves, tried.place)
    unit = spread(call(subject, model, tried.plain[:64]))
    note(influence=in_deviations(pairs, unit), length=T, bound=0.0, leaking_pairs=0, **tried.sample)
    if len(tried.place) < tried.of:
        expect_no_leak_of_one_id(subject, model)
    every = lengths(subject, model)[::-1]
    for T in every:
        expect_no_leak(LeakSearch(subject, model, tried_at(subject, T, rows=4, sweeps=1 / len(every))))
        expect_no_leak(LeakSearch(subject, model, tried_at(subject, T, rows=1, sweeps=1 / len(every)), alone=True))


@needs(CAUSAL)
def check_future_cannot_change_past_in_training(subject: Subject) -> None:
    """In train mode, with or without dropout (same seed), changing a token must not change any earlier logit."""
    expect_causal(subject)
    for dropout in (0.0, DROPOUT):
        model = precise(subject, dropout=dropout)
        way = training_with(dropout)
        every = lengths(subject, model)[::-1]
        for T in every:
            tried = tried_at(subject, T, rows=3, sweeps=2 / len(every))
            expect_no_leak(LeakSearch(subject, model, tried, way), likely=("causal-mask-dropped-on-a-branch",))


@needs(CAUSAL)
def check_future_cannot_change_past_under_a_mask(subject: Subject) -> None:
    """With padding on the right, on the left or nowhere, changing a real token must not change earlier real logits."""
    expect_causal(subject)
    expect_takes_mask(subject)
    model = precise(subject)
    every = lengths(subject, model)[::-1]
    for side in SIDES:
        for way, some in ((EVAL, every), (TRAIN, every[::4])):
            for T in some:
                tokens = every_id(subject, T, rows=6, seed=subject.seed + T)
                mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
                tried = changes(subject, tokens, mask, sweeps=1 / len(every))
                search = LeakSearch(subject, model, tried, way)
                expect_no_leak(search, likely=("pad-mask-replaces-causal",))


@needs(CAUSAL)
def check_future_cannot_change_past_with_extreme_weights(subject: Subject) -> None:
    """With all weights times 20, changing a token must still not change any earlier logit."""
    expect_causal(subject)
    model = magnified(subject)
    tried = changes(subject, every_id(subject, length(subject), rows=8, seed=subject.seed))
    logits = call(subject, model, tried.plain[:64])
    if not within_reach(subject, model):
        raise NotApplicable(f"with weights × {EXTREME}, logits or scores grow too large for any finite mask fill")
    bound = precision(subject).bound(logits, single=2e-5)
    likely = ("mask-fill-of-minus-ten-thousand", "mask-fill-not-negative-enough")
    expect_no_leak(LeakSearch(subject, model, tried, bound=bound, exact=False), likely=likely)


@needs(CAUSAL)
def check_future_cannot_change_past_in_long_sequences(subject: Subject) -> None:
    """In sequences of more than a hundred tokens, changing a token must not change any earlier logit."""
    expect_causal(subject)
    varies = subject.can_vary("block_size")
    T = max(LONG, subject.sizes.block_size) if varies else min(subject.sizes.block_size, LONGEST_TRIED)
    farthest = T if varies else max(T, min(subject.longest or T, FARTHEST))
    if farthest <= length(subject):
        raise NotApplicable(f"the block size is fixed at {T}, and every pair of positions was already tried")
    model = precise(subject, block_size=T) if varies else precise(subject)
    likely = ("causal-hardcoded-length", "chunk-boundary-leaks", "unmasked-beyond-256")
    every = (T, list(range(1, T))), (T - 1, telling_places(T - 1)), (2 * T // 3, telling_places(2 * T // 3))
    for n, places in every if T > length(subject) else ():
        tokens = subject.tokens(1, n, seed=subject.seed)
        tried = changes(subject, tokens, places=places[:: max(n // LONG, 1)], alternatives=1)
        expect_no_leak(LeakSearch(subject, model, tried), likely=likely)
    if farthest > T:
        expect_no_leak_farther_on(subject, model, farthest, T)
    if varies and T < LONGER:
        late = [place for place in telling_places(LONGER) if place > T]
        for n, places in ((LONGER, late), (FARTHEST, [LONGER, 1024])):
            model = precise(subject, block_size=n)
            expect_no_leak(LeakSearch(subject, model, cuts(subject, n, places)), likely=likely)


@needs(CAUSAL)
def check_future_cannot_change_past_by_another_attention(subject: Subject) -> None:
    """With PyTorch's math kernel, or without fused attention, changing a token must not change any earlier logit."""
    expect_causal(subject)
    if not attention_is_fused(subject, precise(subject)):
        raise NotApplicable("attention does not use PyTorch's fused function, so there is no second path")
    expect_causal_with_and_without_masks(subject, precise(subject), PLAIN_KERNEL)
    with without_fused_attention():
        model = precise(subject)
    if not attention_is_fused(subject, model):
        likely = ("causal-mask-only-in-the-fused-path",)
        expect_causal_with_and_without_masks(subject, model, WITHOUT_FUSED, likely)


def expect_causal_with_and_without_masks(
    subject: Subject, model: nn.Module, way: Way, likely: tuple[str, ...] = ()
) -> None:
    T = length(subject)
    tokens = every_id(subject, T, rows=6, seed=subject.seed)
    expect_no_leak(LeakSearch(subject, model, changes(subject, tokens), way), likely=likely)
    for side in SIDES if subject.takes_mask else ():
        mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
        expect_no_leak(LeakSearch(subject, model, changes(subject, tokens, mask), way), likely=likely)


def attention_is_fused(subject: Subject, model: nn.Module) -> bool:
    log = operations_of(lambda: call(subject, model, subject.tokens(1, length(subject))))
    return any("scaled_dot_product" in name for name, *_ in log)


@needs(CAUSAL)
def check_future_cannot_change_past_into_a_cache(subject: Subject) -> None:
    """With an empty key-value cache, changing a token must not change any earlier logit."""
    expect_causal(subject)
    model = with_cache(subject)
    every = lengths(subject, model)[::-1]
    for T in every:
        search = LeakSearch(subject, model, tried_at(subject, T, rows=2, sweeps=2 / len(every)), CACHED)
        expect_no_leak(search, likely=("prefill-unmasked-when-cache-given", "sdpa-topleft-alignment"))


@needs(CAUSAL)
def check_future_cannot_change_past_in_low_precision(subject: Subject) -> None:
    """In float32, bfloat16 and float16, where supported, changing a token must not change any earlier logit."""
    expect_causal(subject)
    refused = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        if slow := subject.too_slow_in(dtype):
            refused[name] = slow
            continue
        model = subject.amplified(seed=subject.seed, dtype=dtype)
        tried = tried_at(subject, length(subject), rows=6)
        try:
            logits = call(subject, model, tried.plain[:8])
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            refused[name] = str(error)
            continue
        bound = Bound(64 * torch.finfo(dtype).eps * spread(logits), f"64 roundings in {name}")
        likely = ("mask-fill-weak-in-half-precision",)
        expect_no_leak(LeakSearch(subject, model, tried, computed_in(dtype), bound=bound), likely=likely)
        if dtype == torch.bfloat16:
            expect_causal_under_autocast(subject, tried, bound, likely)
    note(refused=refused)
    if len(refused) == 3:
        raise NotApplicable("the model runs in none of float32, bfloat16 and float16", **refused)


def expect_causal_under_autocast(subject: Subject, tried: Changes, bound: Bound, likely: tuple[str, ...]) -> None:
    model = subject.amplified(seed=subject.seed, dtype=torch.float32)
    way = autocast_to_bfloat16(subject.device)
    try:
        call(subject, model, tried.plain[:8], way=way)
    except (RuntimeError, TypeError, ValueError) as error:
        note(autocast=str(error))
        return
    expect_no_leak(LeakSearch(subject, model, tried, way, bound=bound), likely=likely)


@st.composite
def rewritings(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    """A batch of which the tokens after a cut are rewritten: rows, length, padding, mode."""
    T = draw(st.integers(2, length(subject)))
    return dict(
        T=T,
        cut=draw(st.integers(1, T - 1)),
        rows=draw(st.integers(1, 4)),
        future=draw(st.sampled_from(("other tokens", "one token repeated", "reversed"))),
        padding=draw(st.sampled_from((None, *SIDES) if subject.takes_mask else (None,))),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@needs(CAUSAL, f"{CAUSAL}_in_training", f"{CAUSAL}_under_a_mask")
@drawn(examples=40, when=expect_causal, case=rewritings)
def check_rewritten_future_cannot_change_past(subject: Subject, case: dict[str, Any]) -> None:
    """Rewriting all tokens from a position on must not change any earlier logit, in any batch, mode and padding."""
    tokens = subject.tokens(case["rows"], case["T"], seed=case["seed"])
    mask = None
    if case["padding"] is not None:
        mask = ragged(case["rows"], case["T"], case["padding"], seed=case["seed"]).to(subject.device)
    places = torch.full((len(tokens),), case["cut"], device=subject.device)
    tried = Changes(tokens, rewritten(subject, tokens, case), places, mask)
    expect_no_leak(LeakSearch(subject, shared(subject), tried, TRAIN if case["training"] else EVAL))


def rewritten(subject: Subject, tokens: Tensor, case: dict[str, Any]) -> Tensor:
    """The tokens, with others from the cut on."""
    past, future = tokens[:, : case["cut"]], tokens[:, case["cut"] :]
    others = subject.tokens(*future.shape, seed=case["seed"] + 1)
    new = {"other tokens": others, "one token repeated": others[:, :1].expand_as(future), "reversed": future.flip(1)}
    return torch.cat((past, new[case["future"]]), dim=1)


@needs(*STEADY)
def check_targets_change_no_logits(subject: Subject) -> None:
    """If the forward takes targets for a loss, they must change no logit, except of a decoder that reads them later."""
    parameter = targets_of(subject)
    if parameter is None or parameter.default is not None:  # a required one may be a decoder's input
        raise NotApplicable("forward takes no targets")
    name = parameter.name
    model, T = precise(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    one, other = (Way(f"with {name}", more={name: subject.tokens(3, T, seed=subject.seed + n)}) for n in (1, 2))
    try:
        before, after = call(subject, model, tokens, way=one), call(subject, model, tokens, way=other)
    except Exception as error:  # it may return only a loss, or need a decoder's input
        raise NotApplicable(f"forward fails when given {name}: {type(error).__name__}: {error}") from None
    if not torch.equal(after, before) and _only_later(subject, model, tokens, one, name):
        note(decoder=f"{name} are shifted to the decoder's input: no logit depends on its own target or a later one")
        return
    expect_same(
        after,
        before,
        says=f"changing {name} changes the logits of the same tokens: the model sees what it must predict",
        where=lambda: first_breaking(
            model,
            lambda: call(subject, model, tokens, way=one),
            lambda: call(subject, model, tokens, way=other),
            lambda a, b: farthest(a, b) > 0,
        ),
        likely=("targets-in-the-logits",),
        advice=f"Use {name} only to compute the loss.",
    )


def _only_later(subject: Subject, model: nn.Module, tokens: Tensor, way: Way, name: str) -> bool:
    """Whether a target changes the logits after its position alone, as where targets are a decoder's input."""
    before = call(subject, model, tokens, way=way)
    for place in range(tokens.shape[1]):
        targets = way.more[name].clone()
        targets[:, place] = (targets[:, place] + 1) % subject.sizes.vocab_size
        after = call(subject, model, tokens, way=Way(way.name, more={name: targets}))
        if not torch.equal(after[:, : place + 1], before[:, : place + 1]):
            return False
    return True


@needs(CAUSAL)
def check_later_tokens_get_no_gradient(subject: Subject) -> None:
    """No logit may have a gradient with respect to a later token's embedding: the Jacobian is lower triangular."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tokens = subject.tokens(1, T, seed=subject.seed)
    with watched_embeddings(model, tokens) as embeddings:
        logits = subject.logits(model, tokens)[0]
    if not embeddings or not logits.requires_grad:
        raise NotApplicable("no module was found that maps token ids to embeddings")
    jacobian = torch.stack([jacobian_sizes(logits, embedding) for embedding in embeddings]).sum(dim=0)
    note(jacobian=[[float(f"{x:.3g}") for x in row] for row in jacobian], length=T)
    later = jacobian.triu(1).nan_to_num(nan=torch.inf)
    if bool(later.any()):
        t, s = (int(i) for i in later.nonzero()[0])
        fail(
            f"the logits at position {t} have a gradient of {float(jacobian[t, s]):.3g} with respect to the embedding "
            f"of the later token {s}, although changing that token does not change them: training sees the future",
            likely=("future-gradient-leak",),
            advice="Look for x + (y - y.detach()), straight-through estimators and custom backward functions.",
            first={"t": t, "s": s},
        )


@needs(*STEADY)
def check_past_reaches_every_later_position(subject: Subject) -> None:
    """Changing a token must change the logits at its own and every later position of its window, if any, and document.

    Documents are what an id parts that hides all before it from all after it.
    """
    expect_causal(subject)
    T = length(subject)
    expect_each_in_its_document(subject)
    tokens = undivided(subject, subject.tokens(2, T, seed=subject.seed))
    moves = torch.zeros(T, T, dtype=torch.float64)
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        tried = changes(subject, tokens, alternatives=3, alone=True)
        unit = spread(call(subject, model, tried.plain[:1]))
        moves = moves.maximum(influence(measure(subject, model, tried, EVAL), tried.place).cpu() / unit)
        silent = in_reach(subject, model, T) & ~(moves > SEEN)
        if not bool(silent.any()):
            break
    note(influence=in_deviations(moves, 1.0), least=float(moves[in_reach(subject, model, T)].min()), bound=SEEN)
    if bool(silent.any()):
        fail_past_unseen(moves, silent, windowed=window(subject, model, T) is not None)
    elif subject.can_vary("block_size"):
        expect_every_late_token_is_read(subject)


def expect_every_late_token_is_read(subject: Subject) -> None:
    """In a long sequence some later position must see each token; the ends of regular chunks may be seen by none."""
    model = precise(subject, EXISTENCE[1], block_size=LONG)
    # Of a large model the last tokens, side by side: a table or a mask ends somewhere, and chunks show as such.
    places = list(range(1, LONG - 1))[-subject.affordable(LONG, LONG - 2, least=LONG // 8) :]
    tokens = undivided(subject, subject.tokens(1, LONG, seed=subject.seed))
    tried = changes(subject, tokens, places=places, alternatives=1, alone=True)
    moves = measure(subject, model, tried, EVAL)
    pairs = influence(moves, tried.place).cpu()
    lost = [s for s in places if not float(pairs[s + 1 :, s].max()) > UNSEEN * float(pairs.max())]
    gaps = {after - before for before, after in pairwise(lost)}
    if lost and (len(lost) < 3 or len(gaps) > 1 or gaps == {1}):
        fail(
            f"in a sequence of {LONG} tokens, changing token {lost[0]} changes no later logit; {len(lost)} of "
            f"{len(places)} tokens are never read by a later position",
            likely=("late-tokens-never-seen", "first-token-never-seen"),
            advice="Look for a mask, a table or a cache that is shorter than the sequence.",
            first={"s": lost[0]},
            tokens=lost[:40],
        )
    if lost:
        advise(
            f"no later position reads tokens {lost[0]}, {lost[1]}, …, as with attention in chunks of {gaps.pop()} "
            "tokens; is that intended?"
        )


def fail_past_unseen(moves: Tensor, silent: Tensor, *, windowed: bool) -> None:
    """Passes a past that ends sharply at one distance if no window is declared: the code may hard-code one."""
    t, s = (int(i) for i in silent.nonzero()[0])
    T, farthest_seen = len(moves), max(int((pair := (moves > SEEN).nonzero())[:, 0].sub(pair[:, 1]).max()), 0)
    band = bool((moves > SEEN).eq(torch.ones(T, T).tril().triu(-farthest_seen).bool()).all())
    if band and farthest_seen > 0 and not windowed:
        advise(
            f"the logits depend only on the last {farthest_seen + 1} tokens, as with a sliding window; is one intended?"
        )
        return
    says = (
        f"token {s} does not reach the logits at position {t}: changing it moves them by {float(moves[t, s]):.3g} "
        f"standard deviations, expected more than {SEEN:.0e}"
    )
    if band and farthest_seen == 0:
        says = "the logits at a position depend only on the token there: no earlier token is read"
    elif band:
        says = f"the logits depend only on the last {farthest_seen + 1} tokens: earlier ones are never read"
    fail(
        f"{says}; {int(silent.sum())} of {T * (T + 1) // 2} pairs of positions show no effect",
        likely=("attention-sees-itself-only", "first-token-never-seen", "window-sign-error"),
        advice="Check that the mask shows every earlier token. If a sliding window is intended, name its attribute or "
        "configuration field `window`.",
        first={"t": t, "s": s},
        influence=in_deviations(moves, 1.0),
    )


@needs(CAUSAL)
def check_prefix_gives_the_same_logits(subject: Subject) -> None:
    """The first t tokens must have the same logits whether read alone or with the tokens after them, for every t."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tokens = every_id(subject, T, rows=6, seed=subject.seed)
    margin = expect_prefixes_agree(
        model,
        partial(call, subject, model),
        tokens,
        lengths(subject, model),
        precision(subject).bound,
        likely=("position-reversed", "causal-hardcoded-length"),
        advice="Count positions and masks from the first token, never from the length of the input.",
    )
    note(difference=margin)
    if subject.can_vary("block_size"):
        expect_long_prefixes_alike(subject)


def expect_long_prefixes_alike(subject: Subject) -> None:
    """Beyond a hundred tokens, where tables, windows and scales may change with the length."""
    model, tokens = precise(subject, block_size=LONG), subject.tokens(1, LONG, seed=subject.seed)
    expect_prefixes_agree(
        model,
        partial(call, subject, model),
        tokens,
        [n for n in telling_places(LONG) if n > length(subject)],
        precision(subject).bound,
        likely=("window-only-when-long", "causal-hardcoded-length"),
        advice="Look for anything that depends on the input's length: a window, a scale, a table that is rebuilt.",
    )


@needs(CAUSAL, REACHES)
def check_one_block_sees_its_window(subject: Subject) -> None:
    """With a declared window of w tokens, each block must see exactly the last w (or w and the token itself)."""
    expect_causal(subject)
    T = length(subject)
    model = one_block(subject, EXISTENCE[-1])
    w = window(subject, model, T)
    if w is None:
        raise NotApplicable(f"the model declares no window shorter than {T} tokens", **declared_windows(model))
    seen = seen_by(subject, model)
    note(window=w, seen=seen.int().tolist())
    count = reach(seen)
    if count == w + 1:
        advise(f"a token sees itself and the {w} before it; in most models a window of {w} counts the token itself")
    elif count != w:
        judge_window(subject, model, w, seen)
        return
    expect_layers_alike(subject, w)
