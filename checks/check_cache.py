"""A key-value cache changes nothing but the time: what is read over it, in any pieces, is what is read whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from checks.expect import (
    EQUAL_SHAPE,
    Bound,
    NotApplicable,
    advise,
    drawn,
    expect_same,
    fail,
    needs,
    note,
)
from checks.padding import ragged
from checks.precision import precise, precision, spread

LOGITS = "check_contract.check_logits_have_shape"
CAUSAL = "check_causality.check_future_cannot_change_past"
DECODING = "check_cache.check_cached_decoding_equals_full"
LONGEST = 24  # tokens


def cached_model(subject: Any, **sizes: Any) -> nn.Module:
    """A model of strong weights that has a cache. Raises NotApplicable where there is none."""
    if not subject.causal:
        raise NotApplicable("declared as not causal: what is read later changes what was read before")
    model = precise(subject, **sizes)
    if subject.new_cache(model, 1) is None:
        raise NotApplicable("the model has no key-value cache that is known here")
    return model


def length(subject: Any) -> int:
    T = min(subject.sizes.block_size, LONGEST)
    if T < 3:
        raise NotApplicable(f"a block size of {T} is too short to be read in pieces")
    return T


@torch.no_grad()
def read_whole(subject: Any, model: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return subject.logits(model, tokens, mask)


@torch.no_grad()
def read_in_pieces(
    subject: Any, model: nn.Module, tokens: Tensor, pieces: Sequence[int], mask: Tensor | None = None, cache: Any = None
) -> Tensor:
    """Logits of all tokens [B, T, V], read over a cache in pieces of so many tokens; ∞ where a call gave none."""
    cache = subject.new_cache(model, len(tokens)) if cache is None else cache
    ends = torch.tensor([0, *pieces]).cumsum(0).tolist()
    found = []
    for start, end in pairwise(ends):
        part = None if mask is None else mask[:, start:end]
        logits = subject.logits(model, tokens[:, start:end], part, cache)
        missing = end - start - logits.shape[1]  # some models answer for the last token of a call only
        found += [logits.new_full((len(tokens), missing, logits.shape[2]), torch.inf), logits]
    return torch.cat(found, dim=1)


def bound(subject: Any, logits: Tensor) -> Bound:
    return precision(subject).bound(logits)


def distances(got: Tensor, want: Tensor) -> Tensor:
    """[B, T]: how far apart two logits are, ∞ where only one of them is NaN, 0 where a call gave none."""
    given = ~got.isposinf().all(dim=-1, keepdim=True)
    apart = torch.where(got.isnan() & want.isnan(), 0.0, (got - want).abs().nan_to_num(nan=torch.inf))
    return torch.where(given, apart, 0.0).amax(dim=-1)


def first_wrong(got: Tensor, want: Tensor, size: float, real: Tensor | None = None) -> tuple[int, int] | None:
    """The row and position of the first logits, of real tokens, that are too far apart."""
    wrong = distances(got, want) > size
    if real is not None:
        wrong = wrong & real
    if not bool(wrong.any()):
        return None
    position = int(wrong.any(dim=0).int().argmax())
    return int(wrong[:, position].int().argmax()), position


def difference(got: Tensor, want: Tensor) -> float:
    return float(distances(got, want).max())


def apart(got: Tensor, want: Tensor, at: tuple[int, int]) -> str:
    """How far two logits are apart at a row and a position, in deviations."""
    return f"by {float(distances(got, want)[at]) / spread(want):.2g} standard deviations of the logits"


@needs(LOGITS, CAUSAL)
def check_cached_decoding_equals_full(subject: Any) -> None:
    """Read over the cache, a prompt at once and then token by token, a text has the logits it has when read whole."""
    model, T = cached_model(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    want = read_whole(subject, model, tokens)
    allowed = bound(subject, want)
    largest = 0.0
    for prefill in dict.fromkeys((max(1, T // 3), 1, T - 1)):
        pieces = [prefill] + [1] * (T - prefill)
        got = read_in_pieces(subject, model, tokens, pieces)
        at = first_wrong(got, want, allowed.size)
        if at is not None:
            judge_pieces(subject, model, tokens, pieces, got, want, at)
        largest = max(largest, difference(got, want))
    note(largest_difference=largest, bound=allowed.size, length=T)


def judge_pieces(
    subject: Any,
    model: nn.Module,
    tokens: Tensor,
    pieces: Sequence[int],
    got: Tensor,
    want: Tensor,
    at: tuple[int, int],
) -> None:
    """Names the piece, the position, and the tokens on which its logits depend and on which they should."""
    row, position = at
    ends = torch.tensor(pieces).cumsum(0).tolist()
    piece = next(i for i, end in enumerate(ends) if position < end)
    start, end = ends[piece] - pieces[piece], ends[piece]
    cause, likely = why(subject, model, tokens, pieces, (got, want), position, start)
    call = f"token {start}" if end - start == 1 else f"tokens {start} to {end - 1}"
    held = f"a cache of {start} token{'s' * (start > 1)}" if start else "the empty cache"
    fail(
        f"{call}, read over {held}: the logits at position {position} differ from those of the whole text "
        f"{apart(got, want, at)}, and {cause}",
        likely=likely,
        advice="over a cache of S tokens the query number i has position S + i, sees keys 0 to S + i, and nothing else",
        pieces=list(pieces),
        row=row,
        position=position,
        depends_on=reached(subject, model, tokens, pieces, position),
        difference=difference(got, want),
    )


def why(
    subject: Any,
    model: nn.Module,
    tokens: Tensor,
    pieces: Sequence[int],
    read: tuple[Tensor, Tensor],
    first: int,
    start: int,
) -> tuple[str, tuple[str, ...]]:
    """What goes with a wrong reading in pieces, of which `first` is the first wrong position; and the likely bugs."""
    got, want = read
    size = bound(subject, want).size
    if start and first < len(want[0]) - 1 and pieces[-1] > 1:  # halves show best what a piece behind a cache sees
        halves = [tokens.shape[1] // 2, tokens.shape[1] - tokens.shape[1] // 2]
        again = read_in_pieces(subject, model, tokens, halves)
        if difference(again, want) > size:
            got, pieces, start = again, halves, halves[0]
            first = int((distances(got, want) > size).any(dim=0).int().argmax())
    alone = torch.cat([read_in_pieces(subject, model, text[None], pieces) for text in tokens])
    if difference(alone, want) <= size:
        return "each row read alone is right: the cache mixes up rows", ("cache-rows-mixed",)
    future = [s for s in reached(subject, model, tokens, pieces, first) if s > first]
    if future:
        return (
            f"depend on the later {places(future)}: the causal mask is lost when there is a cache",
            ("prefill-unmasked-when-cache-given", "no-causal-mask", "sdpa-topleft-chunk-only"),
        )
    wrong = (distances(got, want) > size).any(dim=0).nonzero().flatten().tolist()
    last = wrong[-1]
    seen = reached(subject, model, tokens, pieces, last)
    unseen = [s for s in range(last + 1) if s not in seen]
    if unseen and start and seen == list(range(len(unseen), last + 1)):
        return f"those at {last} do not depend on {places(unseen)}: the cache is written and not read", CAUSES[
            "forgets"
        ]
    if unseen:
        return f"those at {last} depend on {places(seen)} and not on {places(unseen)}", CAUSES["misses"]
    if right_with_one_block(subject, tokens, pieces):
        return "with one block they are right: each block needs keys and values of its own", ("cache-swaps-layers",)
    single = last - first + 1 == len(wrong) and pieces[-1] == 1
    return (
        "depend on the tokens on which they should: look at the positions given to what is read now",
        CAUSES["single"] if start and single else CAUSES["several"],
    )


CAUSES = {
    "forgets": ("cache-not-appended",),
    "misses": ("sdpa-topleft-alignment", "sdpa-topleft-chunk-only", "cache-not-appended"),
    "single": ("decode-position-always-zero", "rope-single-position-kernel", "chunked-prefill-positions"),
    "several": ("prefill-all-same-position", "chunked-prefill-positions", "sdpa-topleft-chunk-only"),
}


def right_with_one_block(subject: Any, tokens: Tensor, pieces: Sequence[int]) -> bool:
    if not subject.can_vary("n_layer"):
        return False
    model = precise(subject, n_layer=1)
    want = read_whole(subject, model, tokens)
    return difference(read_in_pieces(subject, model, tokens, pieces), want) <= bound(subject, want).size


def reached(subject: Any, model: nn.Module, tokens: Tensor, pieces: Sequence[int], position: int) -> list[int]:
    """The tokens that change the logits at a position when they are changed themselves, read in these pieces."""
    T, V = tokens.shape[1], subject.sizes.vocab_size
    texts = tokens[:1].repeat(T + 1, 1)
    for s in range(T):
        texts[s, s] = (texts[s, s] + 1) % V
    logits = read_in_pieces(subject, model, texts, pieces)[:, position]
    moved = (logits[:-1] - logits[-1]).abs().amax(dim=-1) > bound(subject, logits).size
    return moved.nonzero().flatten().tolist()


def places(positions: list[int]) -> str:
    """`token 3`, `tokens 0 to 4`, `tokens 0, 2 and 5`."""
    if len(positions) == 1:
        return f"token {positions[0]}"
    if positions == list(range(positions[0], positions[-1] + 1)):
        return f"tokens {positions[0]} to {positions[-1]}"
    return f"tokens {', '.join(map(str, positions[:-1]))} and {positions[-1]}"


def partitions(subject: Any) -> st.SearchStrategy[list[int]]:
    """Ways to cut a text that fills the block: the lengths of its pieces."""
    T = min(subject.sizes.block_size, LONGEST)
    return st.sets(st.integers(1, T - 1)).map(lambda cuts: [b - a for a, b in pairwise([0, *sorted(cuts), T])])


def has_cache(subject: Any) -> None:
    cached_model(subject)
    length(subject)


@needs(LOGITS, CAUSAL, DECODING)
@drawn(pieces=partitions, seed=st.integers(0, 99), when=has_cache)
def check_cached_pieces_equal_full(subject: Any, pieces: list[int], seed: int) -> None:
    """Read over the cache in pieces of any lengths, a text has the logits it has when it is read whole."""
    model = known_model(subject)
    tokens = subject.tokens(2, sum(pieces), seed=seed)
    want = read_whole(subject, model, tokens)
    got = read_in_pieces(subject, model, tokens, pieces)
    at = first_wrong(got, want, bound(subject, want).size)
    if at is not None:
        judge_pieces(subject, model, tokens, pieces, got, want, at)


def padded(subject: Any) -> None:
    has_cache(subject)
    if not subject.takes_mask:
        raise NotApplicable("the model takes no padding mask")


@needs(LOGITS, CAUSAL, DECODING, "check_cache.check_cached_pieces_equal_full")
@drawn(pieces=partitions, side=st.sampled_from(("left", "right")), seed=st.integers(0, 99), when=padded)
def check_cached_padding_equals_full(subject: Any, pieces: list[int], side: str, seed: int) -> None:
    """Read over the cache in pieces under a padding mask, real tokens have the logits they have when read whole."""
    model, T = known_model(subject), sum(pieces)
    tokens, mask = subject.tokens(3, T, seed=seed), ragged(3, T, side, seed=seed).to(subject.device)
    want = read_whole(subject, model, tokens, mask)
    got = read_in_pieces(subject, model, tokens, pieces, mask)
    at = first_wrong(got, want, bound(subject, want).size, real=mask)
    if at is None:
        return
    row, position = at
    fail(
        f"padded on the {side}, read over the cache in pieces of {pieces}: row {row}, which has {int(mask[row].sum())} "
        f"real tokens of {T}, differs at position {position} from its whole reading {apart(got, want, at)}",
        likely=("cache-forgets-padding", "left-pad-positions-not-from-mask"),
        advice="the cache must keep the mask of all tokens read so far, and positions are counted from it",
        row=row,
        position=position,
        mask=mask[row].int().tolist(),
    )


_models: WeakKeyDictionary[Any, nn.Module] = WeakKeyDictionary()


def known_model(subject: Any) -> nn.Module:
    """The same model for every drawn case of a check."""
    if subject not in _models:
        _models[subject] = cached_model(subject)
    return _models[subject]


@needs(LOGITS, CAUSAL, DECODING)
def check_caches_are_isolated(subject: Any) -> None:
    """A new cache knows nothing of what was read before, and two caches in use side by side do not meet."""
    model, T = cached_model(subject), max(2, length(subject) // 2)  # two such texts fit a block that was not emptied
    first, second = subject.tokens(2, T, seed=subject.seed), subject.tokens(2, T - 1, seed=subject.seed + 1)
    whole, other = read_whole(subject, model, first), read_whole(subject, model, second)
    for text, want, what in (
        (first, whole, "the first text read over a cache"),
        (second, other, "a second text, read over a new cache,"),
        (first, whole, "the first text, read again over a new cache,"),
    ):
        expect_unmoved(subject, read_in_pieces(subject, model, text, [text.shape[1] - 1, 1]), want, what)
    expect_same(
        read_whole(subject, model, first),
        whole,
        says="a text read without a cache changed after others were read with one",
        likely=("cache-leaks-between-calls",),
    )
    if side_by_side(subject, model):
        one, two = subject.new_cache(model, 2), subject.new_cache(model, 2)
        a = [read_in_pieces(subject, model, first[:, :-1], [T - 1], cache=one)]
        b = read_in_pieces(subject, model, second[:, :1], [1], cache=two)
        a.append(read_in_pieces(subject, model, first[:, -1:], [1], cache=one))
        expect_unmoved(
            subject, torch.cat(a, dim=1), whole, "a text read by turns with another, each over its own cache,"
        )
        expect_unmoved(subject, b, other[:, :1], "the other of two texts read by turns")


def side_by_side(subject: Any, model: nn.Module) -> bool:
    """Whether two caches are two things: a model that keeps its one cache inside has nothing to hand out twice."""
    one, two = subject.new_cache(model, 2), subject.new_cache(model, 2)
    if one is two or getattr(one, "inside_the_model", False):
        advise("the model keeps its cache inside itself: one text at a time")
        return False
    return True


def expect_unmoved(subject: Any, got: Tensor, want: Tensor, what: str) -> None:
    at = first_wrong(got, want, bound(subject, want).size)
    if at is not None:
        fail(
            f"{what} differs at position {at[1]} of row {at[0]} from the same text read whole {apart(got, want, at)}: "
            "what was read before is still there",
            likely=("cache-leaks-between-calls",),
            advice="make the cache for a call, or empty it: keys, values, length and mask",
            row=at[0],
            position=at[1],
        )


@needs(LOGITS, CAUSAL, DECODING)
def check_cached_rows_are_isolated(subject: Any) -> None:
    """Over a cache, what one row reads changes nothing in the others, bit for bit."""
    model, T = cached_model(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % subject.sizes.vocab_size
    pieces = [T - 2, 1, 1]
    got, want = (read_in_pieces(subject, model, text, pieces)[[0, 2]] for text in (changed, tokens))
    expect_same(
        got,
        want,
        bound=EQUAL_SHAPE if precision(subject).dtype == precision(subject).inside else bound(subject, want),
        says="row 1 read other tokens over the cache, and rows 0 and 2 changed",
        axes=("row (0 or 2)", "position", "symbol"),
        likely=("cache-rows-mixed",),
        advice="keys and values are stored and read by row: [B, heads, S, width]",
    )


@needs(LOGITS, CAUSAL, DECODING)
def check_cache_overflow_is_refused_or_slides(subject: Any) -> None:
    """More tokens than the block holds are refused, or answered as without a cache; a cache never wraps in silence."""
    model, block = cached_model(subject), subject.sizes.block_size
    if block > 256:
        raise NotApplicable(f"a block size of {block} is too long to be overfilled")
    for pieces in ([block - 1, 1, 1, 1], [block, 2], [block - 1, 3]):
        T = sum(pieces)
        tokens = subject.tokens(2, T, seed=subject.seed)
        try:
            got = read_in_pieces(subject, model, tokens, pieces)
        except Exception as error:
            clearly_refused(error, block)
            continue
        judge_overflow(subject, model, tokens, got, pieces)


def clearly_refused(error: Exception, block: int) -> None:
    if isinstance(error, IndexError) or not str(error):
        advise(
            f"a full cache refuses with {type(error).__name__}: {error}. Say how many tokens came, and that {block} fit"
        )


def judge_overflow(subject: Any, model: nn.Module, tokens: Tensor, got: Tensor, pieces: Sequence[int]) -> None:
    """What came out past the block size is what the model says to the latest tokens, or to all, read whole."""
    T, block = tokens.shape[1], subject.sizes.block_size
    for position in range(block, T):
        answers = []
        for window in (block, position + 1):
            try:
                answers.append(read_whole(subject, model, tokens[:, position + 1 - window : position + 1])[:, -1])
            except Exception:
                continue
        here = got[:, position : position + 1]
        if not answers or any(difference(here, want[:, None]) <= bound(subject, want).size for want in answers):
            continue
        fail(
            f"the cache takes {T} tokens, in pieces of {list(pieces)}, where the block size is {block}, and answers "
            f"at position {position} neither as to the last {block} tokens nor as to all {position + 1}",
            likely=("cache-overflow",),
            advice="refuse what does not fit, naming both lengths; or drop the oldest and read the rest anew",
            position=position,
            block_size=block,
            pieces=list(pieces),
        )
