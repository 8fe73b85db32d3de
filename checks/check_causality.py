"""No token changes what was said before it, on any path through the model, and every token can change what follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .expect import (
    CAUSAL,
    REACHES,
    STEADY,
    Bound,
    NotApplicable,
    advise,
    drawn,
    expect_close,
    expect_same,
    fail,
    farthest,
    needs,
    note,
)
from .probes.ablation import blocks_of, left_alone, one_block
from .probes.embeddings import watched_embeddings
from .probes.extra_arguments import TARGETS, taken
from .probes.influence import (
    EVAL,
    TRAIN,
    Changes,
    Operations,
    Way,
    call,
    changes,
    every_id,
    influence,
    length,
    lengths,
    measure,
    moved,
)
from .probes.leaks import expect_no_leak, in_deviations
from .probes.long import LONG, LONGER, telling_places
from .probes.magnified import EXTREME, magnified, within_reach
from .probes.padding import SIDES, ragged
from .probes.precision import precise, precision, shared, spread
from .probes.preconditions import expect_causal, expect_takes_mask
from .probes.windows import declared_windows, held_by, holds, in_reach, reach, window
from .subject import EXISTENCE, Subject
from .watch.calls import first_breaking
from .watch.location import locate

DROPOUT = 0.2
FARTHEST = 1031  # past the last at which a mask is commonly cut: two cuts see every pair on both sides of one
LONGEST_TRIED = 1024
WINDOWS = ("window-ignored", "window-off-by-one", "window-sign-error")
PRINT_MASK = "Print the mask of each layer: row t is True at columns t - window + 1 to t."
UNSEEN = 1e-9  # of the largest move: what one token among many may still move, rounding apart
SEEN = 1e-3  # standard deviations of the logits: what a token in reach moves at least (clean models: 0.018)


@needs(*STEADY)
def check_future_cannot_change_past(subject: Subject) -> None:
    """Changing a token leaves every logit before it bit for bit as it was, at every length and for every pair."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tried = changes(subject, every_id(subject, T, seed=subject.seed))
    moves = expect_no_leak(subject, model, tried)
    pairs = influence(moves, tried.place)
    unit = spread(call(subject, model, tried.plain[:64]))
    note(influence=in_deviations(pairs, unit), length=T, bound=0.0, leaking_pairs=0)
    for T in reversed(lengths(subject, model)):
        expect_no_leak(subject, model, tried_at(subject, T, rows=4))
        expect_no_leak(subject, model, tried_at(subject, T, rows=1), alone=True)


def tried_at(subject: Subject, T: int, *, rows: int) -> Changes:
    return changes(subject, every_id(subject, T, rows=rows, seed=subject.seed + T))


@needs(CAUSAL)
def check_future_cannot_change_past_in_training(subject: Subject) -> None:
    """In train mode, with dropout and without, under one seed, a token leaves every logit before it as it was."""
    expect_causal(subject)
    for dropout in (0.0, DROPOUT):
        model = precise(subject, dropout=dropout)
        way = Way(f"in train mode with dropout {dropout:g}", training=True)
        for T in reversed(lengths(subject, model)):
            tried = tried_at(subject, T, rows=3)
            expect_no_leak(subject, model, tried, way, likely=("causal-mask-dropped-on-a-branch",))


@needs(CAUSAL)
def check_future_cannot_change_past_under_a_mask(subject: Subject) -> None:
    """With a padding mask (all real, padded right, padded left), a real token leaves every real logit before it."""
    expect_causal(subject)
    expect_takes_mask(subject)
    model = precise(subject)
    every = lengths(subject, model)[::-1]
    for side in SIDES:
        for way, some in ((EVAL, every), (TRAIN, every[::4])):
            for T in some:
                tokens = every_id(subject, T, rows=6, seed=subject.seed + T)
                mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
                expect_no_leak(
                    subject, model, changes(subject, tokens, mask), way, likely=("pad-mask-replaces-causal",)
                )


@needs(CAUSAL)
def check_future_cannot_change_past_with_extreme_weights(subject: Subject) -> None:
    """With every weight twenty times as large, a token still leaves the logits before it as they were."""
    expect_causal(subject)
    model = magnified(subject)
    tried = changes(subject, every_id(subject, length(subject), rows=8, seed=subject.seed))
    logits = call(subject, model, tried.plain[:64])
    if not within_reach(subject, model):
        raise NotApplicable(f"with weights × {EXTREME} logits or scores grow so large that no finite fill would do")
    bound = precision(subject).bound(logits, single=2e-5)
    likely = ("mask-fill-of-minus-ten-thousand", "mask-fill-not-negative-enough")
    expect_no_leak(subject, model, tried, bound=bound, exact=False, likely=likely)


@needs(CAUSAL)
def check_future_cannot_change_past_in_long_sequences(subject: Subject) -> None:
    """At block sizes beyond a hundred tokens, a token leaves every logit before it bit for bit as it was."""
    expect_causal(subject)
    varies = subject.can_vary("block_size")
    T = max(LONG, subject.sizes.block_size) if varies else min(subject.sizes.block_size, LONGEST_TRIED)
    if T <= length(subject):
        raise NotApplicable(f"the block size is fixed at {T}: every pair was tried")
    model = precise(subject, **(dict(block_size=T) if varies else {}))
    likely = ("causal-hardcoded-length", "chunk-boundary-leaks", "unmasked-beyond-256")
    for n, places in ((T, list(range(1, T))), (T - 1, telling_places(T - 1)), (2 * T // 3, telling_places(2 * T // 3))):
        tokens = subject.tokens(1, n, seed=subject.seed)
        tried = changes(subject, tokens, places=places[:: max(n // LONG, 1)], alternatives=1)
        expect_no_leak(subject, model, tried, likely=likely)
    if varies and T < LONGER:
        late = [place for place in telling_places(LONGER) if place > T]
        expect_no_leak(subject, precise(subject, block_size=LONGER), cuts(subject, LONGER, late), likely=likely)
        few = cuts(subject, FARTHEST, [LONGER, 1024])
        expect_no_leak(subject, precise(subject, block_size=FARTHEST), few, likely=likely)


def cuts(subject: Subject, T: int, places: list[int]) -> Changes:
    """One sequence, rewritten from each of the places on: whatever a position sees of its future, some row changes."""
    plain = subject.tokens(1, T, seed=subject.seed).expand(len(places), T).contiguous()
    place = torch.tensor(places, device=plain.device)
    later = torch.arange(T, device=plain.device) >= place[:, None]
    return Changes(plain, torch.where(later, (plain + 1) % subject.sizes.vocab_size, plain), place)


@needs(CAUSAL)
def check_future_cannot_change_past_by_another_attention(subject: Subject) -> None:
    """On PyTorch's plain attention kernel, and without any fused kernel, a token leaves every logit before it."""
    expect_causal(subject)
    if not uses_fused_attention(subject, precise(subject)):
        raise NotApplicable("attention is computed step by step: there is no second path")
    plain = Way("on PyTorch's plain attention kernel", inside=partial(sdpa_kernel, SDPBackend.MATH))
    expect_causal_with_and_without_masks(subject, precise(subject), plain)
    with without_fused_attention():
        model = precise(subject)
    if not uses_fused_attention(subject, model):
        away = Way("built where PyTorch has no fused attention")
        expect_causal_with_and_without_masks(subject, model, away, likely=("causal-mask-only-in-the-fused-path",))


def expect_causal_with_and_without_masks(subject: Subject, model: nn.Module, way: Way, **finding: Any) -> None:
    T = length(subject)
    tokens = every_id(subject, T, rows=6, seed=subject.seed)
    expect_no_leak(subject, model, changes(subject, tokens), way, **finding)
    for side in SIDES if subject.takes_mask else ():
        mask = ragged(len(tokens), T, side, seed=subject.seed).to(subject.device)
        expect_no_leak(subject, model, changes(subject, tokens, mask), way, **finding)


def uses_fused_attention(subject: Subject, model: nn.Module) -> bool:
    operations = Operations()
    with operations:
        call(subject, model, subject.tokens(1, length(subject)))
    return any("scaled_dot_product" in name for name, *_ in operations.log)


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Code that asks PyTorch with `hasattr` whether it has fused attention is told that it has not."""
    fused = F.scaled_dot_product_attention
    del F.scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@needs(CAUSAL)
def check_future_cannot_change_past_into_a_cache(subject: Subject) -> None:
    """Read into an empty key-value cache, a token leaves every logit before it bit for bit as it was."""
    expect_causal(subject)
    model = precise(subject)
    if subject.new_cache(model, 1) is None:
        raise NotApplicable("the subject has no key-value cache")
    way = Way("read into an empty key-value cache", cached=True)
    for T in reversed(lengths(subject, model)):
        likely = ("prefill-unmasked-when-cache-given", "sdpa-topleft-alignment")
        expect_no_leak(subject, model, tried_at(subject, T, rows=2), way, likely=likely)


@needs(CAUSAL)
def check_future_cannot_change_past_in_low_precision(subject: Subject) -> None:
    """In float32, bfloat16 and float16, where the subject takes them, a token leaves every logit before it."""
    expect_causal(subject)
    refused = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = subject.amplified(seed=subject.seed, dtype=dtype)
        tried = tried_at(subject, length(subject), rows=6)
        name = str(dtype).removeprefix("torch.")
        try:
            logits = call(subject, model, tried.plain[:8])
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            refused[name] = str(error)
            continue
        bound = Bound(64 * torch.finfo(dtype).eps * spread(logits), f"64 roundings in {name}")
        likely = ("mask-fill-weak-in-half-precision",)
        expect_no_leak(subject, model, tried, Way(f"in {name}"), bound=bound, likely=likely)
        if dtype == torch.bfloat16:
            expect_causal_under_autocast(subject, tried, bound, likely)
    note(refused=refused)
    if len(refused) == 3:
        raise NotApplicable("the subject takes no precision but its own", **refused)


def expect_causal_under_autocast(subject: Subject, tried: Changes, bound: Bound, likely: tuple[str, ...]) -> None:
    model = subject.amplified(seed=subject.seed, dtype=torch.float32)
    inside = partial(torch.autocast, subject.device.type, dtype=torch.bfloat16)
    way = Way("under autocast to bfloat16", inside=inside)
    try:
        call(subject, model, tried.plain[:8], way=way)
    except (RuntimeError, TypeError, ValueError) as error:
        note(autocast=str(error))
        return
    expect_no_leak(subject, model, tried, way, bound=bound, likely=likely)


@st.composite
def rewritings(draw: st.DrawFn, subject: Subject) -> dict[str, Any]:
    """A batch whose rows go on differently after a cut: how many rows, how long, padded where, in which mode."""
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
    """Whatever a sequence goes on with after a cut, in whatever batch, mode and padding, the logits before it stay."""
    tokens = subject.tokens(case["rows"], case["T"], seed=case["seed"])
    mask = None
    if case["padding"] is not None:
        mask = ragged(case["rows"], case["T"], case["padding"], seed=case["seed"]).to(subject.device)
    cuts = torch.full((len(tokens),), case["cut"], device=subject.device)
    tried = Changes(tokens, rewritten(subject, tokens, case), cuts, mask)
    expect_no_leak(subject, shared(subject), tried, TRAIN if case["training"] else EVAL)


def rewritten(subject: Subject, tokens: Tensor, case: dict[str, Any]) -> Tensor:
    """The tokens with another future from the cut on."""
    past, future = tokens[:, : case["cut"]], tokens[:, case["cut"] :]
    others = subject.tokens(*future.shape, seed=case["seed"] + 1)
    new = {"other tokens": others, "one token repeated": others[:, :1].expand_as(future), "reversed": future.flip(1)}
    return torch.cat((past, new[case["future"]]), dim=1)


@needs(*STEADY)
def check_targets_change_no_logits(subject: Subject) -> None:
    """Where the forward takes targets for a loss, other targets leave every logit bit for bit as it was."""
    parameter = taken(subject, TARGETS)
    if parameter is None or parameter.default is not None:  # one that must be given may be a decoder's input
        raise NotApplicable("forward takes no targets")
    name = parameter.name
    model, T = precise(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    one, other = (Way(f"with {name}", more={name: subject.tokens(3, T, seed=subject.seed + n)}) for n in (1, 2))
    try:
        before, after = call(subject, model, tokens, way=one), call(subject, model, tokens, way=other)
    except Exception as error:  # only a loss may come back, or a decoder's input be missing
        raise NotApplicable(f"{name} cannot be handed over: {type(error).__name__}: {error}") from None
    expect_same(
        after,
        before,
        says=f"other {name} give other logits for the same tokens: the model is shown what it is to predict",
        where=lambda: first_breaking(
            model,
            lambda: call(subject, model, tokens, way=one),
            lambda: call(subject, model, tokens, way=other),
            lambda a, b: farthest(a, b) > 0,
        ),
        likely=("targets-in-the-logits",),
        advice=f"Use {name} in the loss alone.",
    )


@needs(CAUSAL)
def check_later_tokens_get_no_gradient(subject: Subject) -> None:
    """No logit has a gradient with respect to the embedding of a later token: the Jacobian is lower triangular."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tokens = subject.tokens(1, T, seed=subject.seed)
    with watched_embeddings(model, tokens) as embeddings:
        logits = subject.logits(model, tokens)[0]
    if not embeddings or not logits.requires_grad:
        raise NotApplicable("no module takes the token ids and gives their embeddings")
    jacobian = torch.stack([sizes_of_gradients(logits, embedding) for embedding in embeddings]).sum(dim=0)
    note(jacobian=[[float(f"{x:.3g}") for x in row] for row in jacobian], length=T)
    later = jacobian.triu(1).nan_to_num(nan=torch.inf)
    if bool(later.any()):
        t, s = (int(i) for i in later.nonzero()[0])
        fail(
            f"the logits at position {t} have a gradient of {float(jacobian[t, s]):.3g} with respect to the embedding "
            f"of token {s}, after it, although changing that token changes nothing there: training sees the future",
            likely=("future-gradient-leak",),
            advice="Look for x + (y - y.detach()), straight-through estimators and custom backward functions.",
            first={"t": t, "s": s},
        )


def sizes_of_gradients(logits: Tensor, embedding: Tensor) -> Tensor:
    """[T, T], row t, column s: the largest gradient of a random sum of the logits at t at the embedding of token s."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0)).to(logits)
    rows = []
    for t in range(len(logits)):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedding, retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(embedding) if gradient is None else gradient
        time = next(axis for axis, size in enumerate(embedding.shape) if size == len(logits))
        rows.append(gradient.abs().movedim(time, 0).flatten(1).amax(dim=1))
    return torch.stack(rows)


@needs(*STEADY)
def check_past_reaches_every_later_position(subject: Subject) -> None:
    """Changing a token changes the logits at its own and at every later position (within a window, if there is one)."""
    expect_causal(subject)
    T = length(subject)
    reach = torch.zeros(T, T, dtype=torch.float64)
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        tried = changes(subject, subject.tokens(2, T, seed=subject.seed), alternatives=3)
        unit = spread(call(subject, model, tried.plain[:1]))
        reach = reach.maximum(influence(measure(subject, model, tried, EVAL), tried.place).cpu() / unit)
        silent = in_reach(subject, model, T) & ~(reach > SEEN)
        if not bool(silent.any()):
            break
    note(influence=in_deviations(reach, 1.0), least=float(reach[in_reach(subject, model, T)].min()), bound=SEEN)
    if bool(silent.any()):
        fail_past_unseen(reach, silent, windowed=window(subject, model, T) is not None)
    elif subject.can_vary("block_size"):
        expect_every_late_token_is_read(subject)


def expect_every_late_token_is_read(subject: Subject) -> None:
    """In a long sequence some later position sees each token; the ends of regular pieces may be seen by none."""
    model = precise(subject, EXISTENCE[1], block_size=LONG)
    tried = changes(
        subject, subject.tokens(1, LONG, seed=subject.seed), places=list(range(1, LONG - 1)), alternatives=1
    )
    plain, changed = call(subject, model, tried.plain[:1]), call(subject, model, tried.changed)
    pairs = influence(moved(plain, changed), tried.place).cpu()
    lost = [s for s in range(1, LONG - 1) if not float(pairs[s + 1 :, s].max()) > UNSEEN * float(pairs.max())]
    gaps = {after - before for before, after in pairwise(lost)}
    if lost and (len(lost) < 3 or len(gaps) > 1 or gaps == {1}):
        fail(
            f"in a sequence of {LONG} tokens, token {lost[0]} reaches no later position: changing it changes none of "
            f"their logits; {len(lost)} of {LONG - 2} tokens are read by none",
            likely=("late-tokens-never-seen", "first-token-never-seen"),
            advice="Look for a mask, a table or a cache that is shorter than the sequence.",
            first={"s": lost[0]},
            tokens=lost[:40],
        )
    if lost:
        advise(f"tokens {lost[0]}, {lost[1]}, … are read by no later one: are pieces of {gaps.pop()} tokens meant?")


def fail_past_unseen(reach: Tensor, silent: Tensor, *, windowed: bool) -> None:
    """Not where the past ends sharply at one distance and no window is declared: it may be written in the code."""
    t, s = (int(i) for i in silent.nonzero()[0])
    T, farthest_seen = len(reach), max(int((pair := (reach > SEEN).nonzero())[:, 0].sub(pair[:, 1]).max()), 0)
    band = bool((reach > SEEN).eq(torch.ones(T, T).tril().triu(-farthest_seen).bool()).all())
    if band and farthest_seen > 0 and not windowed:
        advise(f"the logits depend on the last {farthest_seen + 1} tokens alone: is a sliding window meant?")
        return
    says = (
        f"token {s} does not reach the logits at position {t}: changing it moves them by {float(reach[t, s]):.3g} "
        f"standard deviations, expected more than {SEEN:.0e}"
    )
    if band and farthest_seen == 0:
        says = "the logits at a position depend on its own token alone: nothing of the past is read"
    elif band:
        says = f"the logits depend on the last {farthest_seen + 1} tokens alone: older ones are never read"
    fail(
        f"{says}; {int(silent.sum())} of {T * (T + 1) // 2} pairs are silent",
        likely=("attention-sees-itself-only", "first-token-never-seen", "window-sign-error"),
        advice="A sliding window is recognised by an attribute or a field of the configuration named `window`.",
        first={"t": t, "s": s},
        influence=in_deviations(reach, 1.0),
    )


@needs(CAUSAL)
def check_prefix_gives_the_same_logits(subject: Subject) -> None:
    """Reading only the first t tokens gives the same logits for them as reading all, for every t."""
    expect_causal(subject)
    model, T = precise(subject), length(subject)
    tokens = every_id(subject, T, rows=6, seed=subject.seed)
    whole = call(subject, model, tokens)
    bound, margin = precision(subject).bound(whole), 0.0
    for t in lengths(subject, model):
        prefix = tokens[:, :t].contiguous()
        got = call(subject, model, prefix)
        margin = max(margin, farthest(got, whole[:, :t]))
        expect_close(
            got,
            whole[:, :t],
            bound=bound,
            says=f"the first {t} of {T} tokens read by themselves give other logits than read with the rest",
            likely=("position-reversed", "causal-hardcoded-length"),
            advice="Positions and masks must be counted from the first token, never from the length of the input.",
            length=t,
        )
    note(difference=margin, bound=bound.size)
    if subject.can_vary("block_size"):
        expect_long_prefixes_alike(subject)


def expect_long_prefixes_alike(subject: Subject) -> None:
    """Beyond a hundred tokens: tables, windows and scales may change with the length."""
    model, tokens = precise(subject, block_size=LONG), subject.tokens(1, LONG, seed=subject.seed)
    whole = call(subject, model, tokens)
    for t in (n for n in telling_places(LONG) if n > length(subject)):
        expect_close(
            call(subject, model, tokens[:, :t].contiguous()),
            whole[:, :t],
            bound=precision(subject).bound(whole),
            says=f"the first {t} of {LONG} tokens read by themselves give other logits than read with the rest",
            likely=("window-only-when-long", "causal-hardcoded-length"),
            advice="Look for what depends on the length of the input: a window, a scale, a table that is built anew.",
            length=t,
        )


@needs(CAUSAL, REACHES)
def check_one_block_sees_its_window(subject: Subject) -> None:
    """Where a window of w tokens is declared, each block sees just the last w (or w and itself), at every position."""
    expect_causal(subject)
    T = length(subject)
    model = one_block(subject, EXISTENCE[-1])
    w = window(subject, model, T)
    if w is None:
        raise NotApplicable(f"no window shorter than {T} tokens is declared", **declared_windows(model))
    seen = seen_by(subject, model)
    note(window=w, seen=seen.int().tolist())
    count = reach(seen)
    if count == w + 1:
        advise(f"a token sees itself and {w} before it; in most models a window of {w} counts the token itself")
    elif count != w:
        judge_window(subject, model, w, seen)
        return
    expect_layers_alike(subject, w)


def seen_by(subject: Subject, model: nn.Module) -> Tensor:
    """[T, T], True where position t (row) sees token s (column)."""
    tried = changes(subject, subject.tokens(2, length(subject), seed=subject.seed), alternatives=3)
    return influence(measure(subject, model, tried, EVAL), tried.place).cpu() > 0


def judge_window(subject: Subject, model: nn.Module, w: int, seen: Tensor) -> None:
    """Fails where every position sees as many tokens, and the block itself says that they should be others."""
    T, count = len(seen), reach(seen)
    if count is None:
        raise NotApplicable("how far back a token sees varies with its position", window=w, seen=seen.int().tolist())
    if not holds(subject, model, w):
        advise(
            f"the configuration speaks of a window of {w}, and the one block that was left sees {count} of {T} tokens"
        )
        return
    t, s = (int(i) for i in (seen != torch.ones(T, T, dtype=torch.bool).tril().triu(1 - w)).nonzero()[0])
    fail(
        f"one block with a window of {w} tokens: position {t} {'sees' if bool(seen[t, s]) else 'does not see'} token "
        f"{s}, {t - s} before it; the last position sees {count} tokens, expected {w} ({w + 1} where the token itself "
        "is not counted)",
        likely=WINDOWS,
        advice=PRINT_MASK,
        first={"t": t, "s": s},
        window=w,
    )


def expect_layers_alike(subject: Subject, w: int) -> None:
    """Each block by itself, where it stands, sees as far as its own window, counted as most of the blocks count it.

    Of a window that only the configuration speaks of, other blocks may be free, and a miss by one is no choice. What
    sees all of the past may be meant to.
    """
    model = precise(subject, EXISTENCE[-1])
    names = blocks_of(model)
    over: dict[str, int] = {}  # by how many tokens a block sees more than its window
    for name in names:
        with left_alone(model, name, names):
            count = reach(seen_by(subject, model))
        own = held_by(model.get_submodule(name))
        if count not in (None, length(subject)) and (own is not None or abs(count - w) <= 1):
            over[name] = count - (own or w)
    usual = max((0, 1), key=list(over.values()).count)
    odd = next((name for name, more in over.items() if more != usual), None)
    if odd is not None:
        own = held_by(model.get_submodule(odd)) or w
        fail(
            f"{odd} by itself sees {own + over[odd]} tokens: its window is {own}, which in the other blocks shows "
            f"{own + usual}",
            where=locate(model, odd),
            likely=("window-off-by-one-in-one-layer", *WINDOWS),
            advice=PRINT_MASK,
            module=odd,
            window=own,
            over=over,
        )
