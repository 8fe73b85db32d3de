"""The key-value cache: decoding with it, in pieces of any lengths, must give the logits of the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from .expect import CAUSAL, REPEATS, SHAPE, NotApplicable, advise, drawn, expect_same, fail, needs, note
from .probes.cached import LONGEST, Reader, apart, difference, distances, first_wrong, length, reader
from .probes.padding import ragged
from .probes.windows import window
from .subject import Subject

DECODING = "check_cache.check_cached_decoding_equals_full"
PIECES = "check_cache.check_cached_pieces_equal_full"


@needs(SHAPE, CAUSAL, REPEATS)
def check_cached_decoding_equals_full(subject: Subject) -> None:
    """Prefill and then decoding token by token with the cache must give the same logits as reading the whole text."""
    read, T = _readable(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    want = read.whole(tokens)
    allowed, largest = read.bound(want), 0.0
    for prefill in dict.fromkeys((max(1, T // 3), 1, T - 1)):
        pieces = [prefill] + [1] * (T - prefill)
        got = read.pieces(tokens, pieces)
        at = first_wrong(got, want, allowed.size)
        if at is not None:
            judge_pieces(read, tokens, pieces, got, want, at)
        largest = max(largest, difference(got, want))
    note(largest_difference=largest, bound=allowed.size, length=T)


def _readable(subject: Subject) -> Reader:
    """Fails where the model has a cache and cannot read a text with it."""
    try:
        return reader(subject)
    except NotApplicable:
        raise
    except Exception as error:
        fail(
            "the model cannot read a text with its cache: two tokens into an empty cache, then one at a time, "
            f"raise {type(error).__name__}: {error}",
            advice="Keys and values are [B, heads, T, width]: append the new ones along T. With S of them in the "
            "cache, a token has position S, and its mask [1, S + 1].",
        )


def judge_pieces(
    read: Reader, tokens: Tensor, pieces: Sequence[int], got: Tensor, want: Tensor, at: tuple[int, int]
) -> None:
    """Fails with the piece, the position, and the tokens on which its logits depend and on which they should."""
    row, position = at
    ends = torch.tensor(pieces).cumsum(0).tolist()
    piece = next(i for i, end in enumerate(ends) if position < end)
    start, end = ends[piece] - pieces[piece], ends[piece]
    cause, likely = why(read, tokens, pieces, (got, want), position, start)
    call = f"token {start}" if end - start == 1 else f"tokens {start} to {end - 1}"
    held = f"a cache of {start} token{'s' * (start > 1)}" if start else "an empty cache"
    fail(
        f"given {call} and {held}, the logits at position {position} differ from those of the whole text "
        f"{apart(got, want, at)}: {cause}",
        likely=likely,
        advice="with S tokens in the cache, give query i the position S + i and let it attend to keys 0 to S + i only",
        pieces=list(pieces),
        row=row,
        position=position,
        depends_on=reached(read, tokens, pieces, position),
        difference=difference(got, want),
    )


def why(
    read: Reader, tokens: Tensor, pieces: Sequence[int], found: tuple[Tensor, Tensor], first: int, start: int
) -> tuple[str, tuple[str, ...]]:
    """What is wrong with logits read in pieces, of which `first` is the first wrong position, and the likely bugs."""
    got, want = found
    size = read.bound(want).size
    if (
        start and first < len(want[0]) - 1 and pieces[-1] > 1
    ):  # two halves show best what a piece attends to in the cache
        halves = [tokens.shape[1] // 2, tokens.shape[1] - tokens.shape[1] // 2]
        again = read.pieces(tokens, halves)
        if difference(again, want) > size:
            got, pieces, start = again, halves, halves[0]
            first = int((distances(got, want) > size).any(dim=0).int().argmax())
    alone = torch.cat([read.pieces(text[None], pieces) for text in tokens])
    if difference(alone, want) <= size:
        return "each row alone is right, so the cache mixes up rows", ("cache-rows-mixed",)
    future = [s for s in reached(read, tokens, pieces, first) if s > first]
    if future:
        return (
            f"they depend on the later {places(future)}, so the causal mask is missing when there is a cache",
            ("prefill-unmasked-when-cache-given", "no-causal-mask", "sdpa-topleft-chunk-only"),
        )
    wrong = (distances(got, want) > size).any(dim=0).nonzero().flatten().tolist()
    last = wrong[-1]
    seen = reached(read, tokens, pieces, last)
    unseen = [s for s in range(last + 1) if s not in seen]
    if unseen and start and seen == list(range(len(unseen), last + 1)):
        cause = f"at position {last} they do not depend on {places(unseen)}, so the cache is written but not read"
        return cause, CAUSES["forgets"]
    if unseen:
        return f"at position {last} they depend on {places(seen)}, but not on {places(unseen)}", CAUSES["misses"]
    if right_with_one_block(read, tokens, pieces):
        return "with one block they are right, so blocks share keys and values", ("cache-swaps-layers",)
    if (w := window_passed(read, tokens, want)) is not None:
        return (
            f"decoded from the first token on, all are right up to position {w - 1}: the declared window of {w} tokens "
            "is not applied to cached keys",
            CAUSES["window"],
        )
    single = last - first + 1 == len(wrong) and pieces[-1] == 1
    return (
        "they depend on the right tokens, so the new tokens may have wrong positions",
        CAUSES["single"] if start and single else CAUSES["several"],
    )


def window_passed(read: Reader, tokens: Tensor, want: Tensor) -> int | None:
    """The declared window, if decoding token by token goes wrong exactly where the first key leaves it."""
    T = tokens.shape[1]
    w = window(read.subject, read.model, T)
    if w is None:
        return None
    wrong = (distances(read.pieces(tokens, [1] * T), want) > read.bound(want).size).any(dim=0).nonzero().flatten()
    return w if len(wrong) and int(wrong[0]) == w else None


CAUSES = {
    "window": ("window-lost-in-decoding",),
    "forgets": ("cache-not-appended",),
    "misses": ("sdpa-topleft-alignment", "sdpa-topleft-chunk-only", "cache-not-appended"),
    "single": ("decode-position-always-zero", "rope-single-position-kernel", "chunked-prefill-positions"),
    "several": ("prefill-all-same-position", "chunked-prefill-positions", "sdpa-topleft-chunk-only"),
}


def right_with_one_block(read: Reader, tokens: Tensor, pieces: Sequence[int]) -> bool:
    """Whether a model of a single block reads these pieces right."""
    if not read.subject.can_vary("n_layer"):
        return False
    one = read.sharp(n_layer=1)
    want = one.whole(tokens)
    return difference(one.pieces(tokens, pieces), want) <= one.bound(want).size


def reached(read: Reader, tokens: Tensor, pieces: Sequence[int], position: int) -> list[int]:
    """The tokens whose change changes the logits at a position, when the text is read in these pieces."""
    T, V = tokens.shape[1], read.subject.sizes.vocab_size
    texts = tokens[:1].repeat(T + 1, 1)
    for s in range(T):
        texts[s, s] = (texts[s, s] + 1) % V
    logits = read.pieces(texts, pieces)[:, position]
    moved = (logits[:-1] - logits[-1]).abs().amax(dim=-1) > read.bound(logits).size
    return moved.nonzero().flatten().tolist()


def places(positions: list[int]) -> str:
    """`token 3`, `tokens 0 to 4`, `tokens 0, 2 and 5`."""
    if len(positions) == 1:
        return f"token {positions[0]}"
    if positions == list(range(positions[0], positions[-1] + 1)):
        return f"tokens {positions[0]} to {positions[-1]}"
    return f"tokens {', '.join(map(str, positions[:-1]))} and {positions[-1]}"


def partitions(subject: Subject) -> st.SearchStrategy[list[int]]:
    """The lengths of the pieces into which a text that fills the block is cut."""
    T = min(subject.sizes.block_size, LONGEST)
    return st.sets(st.integers(1, T - 1)).map(lambda cuts: [b - a for a, b in pairwise([0, *sorted(cuts), T])])


def reads_pieces(subject: Subject) -> None:
    """Raises NotApplicable if the model refuses two tokens over a filled cache: it decodes one at a time only."""
    read = reader(subject).sharp()  # whatever this leaves behind
    try:
        read.pieces(subject.tokens(2, 3, seed=subject.seed), [1, 2])
    except Exception as error:
        raise NotApplicable(
            f"over a filled cache the model takes one token at a time: two raise {type(error).__name__}: {error}"
        ) from None


@needs(DECODING)
@drawn(pieces=partitions, seed=st.integers(0, 99), when=reads_pieces)
def check_cached_pieces_equal_full(subject: Subject, pieces: list[int], seed: int) -> None:
    """Reading a text with the cache, in pieces of any lengths, must give the same logits as reading it whole."""
    read, tokens = reader(subject), subject.tokens(2, sum(pieces), seed=seed)
    want, got = read.whole(tokens), read.pieces(tokens, pieces)
    at = first_wrong(got, want, read.bound(want).size)
    if at is not None:
        judge_pieces(read, tokens, pieces, got, want, at)


def padded(subject: Subject) -> None:
    reads_pieces(subject)
    if not subject.takes_mask:
        raise NotApplicable("the model takes no padding mask")


@needs(DECODING, PIECES)
@drawn(pieces=partitions, side=st.sampled_from(("left", "right")), seed=st.integers(0, 99), when=padded)
def check_cached_padding_equals_full(subject: Subject, pieces: list[int], side: str, seed: int) -> None:
    """Reading a padded batch with the cache, in pieces, must give real tokens the same logits as reading it whole."""
    read, T = reader(subject), sum(pieces)
    tokens, mask = subject.tokens(3, T, seed=seed), ragged(3, T, side, seed=seed).to(subject.device)
    want, got = read.whole(tokens, mask), read.pieces(tokens, pieces, mask)
    at = first_wrong(got, want, read.bound(want).size, real=mask)
    if at is None:
        return
    if (wider := without_lone_padding(pieces, mask)) != pieces:
        again = read.pieces(tokens, wider, mask)
        if first_wrong(again, want, read.bound(want).size, real=mask) is None:
            advise(
                "a piece of a single token is always read as a real one, also where the mask says that it is padding: "
                "read the padding of a prompt in pieces of two tokens or more"
            )
            return
    row, position = at
    fail(
        f"padded on the {side} and read with the cache in pieces of {pieces}, the logits of row {row} "
        f"({int(mask[row].sum())} real tokens of {T}) at position {position} differ from those of the whole text "
        f"{apart(got, want, at)}",
        likely=("cache-forgets-padding", "left-pad-positions-not-from-mask"),
        advice="keep the mask of all tokens read so far in the cache, and count positions from it",
        row=row,
        position=position,
        mask=mask[row].int().tolist(),
    )


def without_lone_padding(pieces: list[int], mask: Tensor) -> list[int]:
    """The same pieces, a single token that is padding in some row joined with the piece that follows it.

    Code that takes single tokens for generated ones does not look for padding among them.
    """
    joined, start, waiting = [], 0, 0
    for size in pieces:
        start, waiting = start + size, waiting + size
        if waiting > 1 or bool(mask[:, start - 1].all()):
            joined.append(waiting)
            waiting = 0
    return [*joined, waiting] if waiting else joined


@needs(DECODING)
def check_caches_are_isolated(subject: Subject) -> None:
    """A new cache must hold nothing of earlier texts, and two caches used in turn must not affect each other."""
    read, T = (
        reader(subject),
        max(2, length(subject) // 2),
    )  # so that two texts fit even into a cache that was not emptied
    first, second = subject.tokens(2, T, seed=subject.seed), subject.tokens(2, T - 1, seed=subject.seed + 1)
    whole, other = read.whole(first), read.whole(second)
    for text, want, what in (
        (first, whole, "the first text read with a cache"),
        (second, other, "a second text, read with a new cache,"),
        (first, whole, "the first text, read again with a new cache,"),
    ):
        pieces = [text.shape[1] - 1, 1] if text.shape[1] > 1 else [1]
        expect_unmoved(read, read.pieces(text, pieces), want, what)
    expect_same(
        read.whole(first),
        whole,
        says="reading texts with a cache changed the logits of a text read without one",
        advice="keep keys and values in the cache that is passed in, never on the module or in a default argument",
        likely=("cache-leaks-between-calls",),
    )
    if side_by_side(read):
        one, two = read.new_cache(2), read.new_cache(2)
        a = [read.pieces(first[:, :-1], [T - 1], cache=one)]
        b = read.pieces(second[:, :1], [1], cache=two)
        a.append(read.pieces(first[:, -1:], [1], cache=one))
        expect_unmoved(read, torch.cat(a, dim=1), whole, "a text read in turn with another, each with its own cache,")
        expect_unmoved(read, b, other[:, :1], "the other of two texts read in turn")


def side_by_side(read: Reader) -> bool:
    """Whether two caches can be used in turn: not where the model keeps a single cache inside itself."""
    one, two = read.new_cache(2), read.new_cache(2)
    if one is two or getattr(one, "inside_the_model", False):
        advise("the model keeps its cache inside itself, so it can decode only one text at a time")
        return False
    return True


def expect_unmoved(read: Reader, got: Tensor, want: Tensor, what: str) -> None:
    at = first_wrong(got, want, read.bound(want).size)
    if at is not None:
        fail(
            f"{what} differs at position {at[1]} of row {at[0]} from the same text read whole {apart(got, want, at)}: "
            "something of an earlier text is still there",
            likely=("cache-leaks-between-calls",),
            advice="create the cache for each text, or clear all of it: keys, values, length and mask",
            row=at[0],
            position=at[1],
        )


@needs(DECODING)
def check_cached_rows_are_isolated(subject: Subject) -> None:
    """With a cache, the tokens of one row must not change the logits of the others."""
    read, T = reader(subject), length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % subject.sizes.vocab_size
    got, want = (read.pieces(text, [T - 2, 1, 1])[[0, 2]] for text in (changed, tokens))
    expect_same(
        got,
        want,
        bound=read.bound(want),  # not exactly: an expert multiplies all tokens routed to it at once, other rows' too
        says="with a cache, other tokens in row 1 change the logits of rows 0 and 2",
        axes=("row (0 or 2)", "position", "symbol"),
        likely=("cache-rows-mixed",),
        advice="store and read keys and values by row: [B, heads, S, width]",
    )


@needs(DECODING, PIECES)
def check_cache_overflow_is_refused_or_slides(subject: Subject) -> None:
    """Beyond its block size a cache must refuse tokens, or give the logits that the model gives without one."""
    read, block = reader(subject), subject.sizes.block_size
    if block > 256:
        raise NotApplicable(f"a block size of {block} takes too long to exceed")
    for pieces in ([block - 1, 1, 1, 1], [block, 2], [block - 1, 3]):
        tokens = subject.tokens(2, sum(pieces), seed=subject.seed)
        try:
            got = read.pieces(tokens, pieces)
        except Exception as error:
            clearly_refused(error, block)
            continue
        judge_overflow(read, tokens, got, pieces)


def clearly_refused(error: Exception, block: int) -> None:
    """Advises a clear message where an overflow ends in an index error or says nothing."""
    if isinstance(error, IndexError) or not str(error):
        advise(
            f"a full cache raises {type(error).__name__}: {error}. A ValueError naming the number of tokens and the "
            f"limit ({block}) would be clearer"
        )


def judge_overflow(read: Reader, tokens: Tensor, got: Tensor, pieces: Sequence[int]) -> None:
    """Fails unless the logits beyond the block size are those of the latest tokens, or of all, read whole."""
    T, block = tokens.shape[1], read.subject.sizes.block_size
    readers = [(read, block), *((one, T) for one in (read, longer(read)) if one is not None)]
    for position in range(block, T):
        answers = []
        for one, kept in readers:
            try:
                answers.append(one.whole(tokens[:, max(position + 1 - kept, 0) : position + 1])[:, -1])
            except Exception:
                continue
        here = got[:, position : position + 1]
        if not answers or any(difference(here, want[:, None]) <= read.bound(want).size for want in answers):
            continue
        fail(
            f"the cache accepts {T} tokens, in pieces of {list(pieces)}, though the block size is {block}; the logits "
            f"at position {position} are those of neither the last {block} tokens nor all {position + 1}",
            likely=("cache-overflow",),
            advice="refuse tokens that do not fit, naming both lengths, or drop the oldest and read the rest again",
            position=position,
            block_size=block,
            pieces=list(pieces),
        )


def longer(read: Reader) -> Reader | None:
    """The same weights at twice the block size, if no weight depends on it, as with rotary positions."""
    if not read.subject.can_vary("block_size"):
        return None
    other = read.sharp(block_size=2 * read.subject.sizes.block_size)
    own, theirs = dict(read.model.named_parameters()), dict(other.model.named_parameters())
    if {name: x.shape for name, x in own.items()} != {name: x.shape for name, x in theirs.items()}:
        return None
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    return other
