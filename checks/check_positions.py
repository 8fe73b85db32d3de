"""The order of tokens must matter, and rotary positions must be relative.

Order is judged on one block: a deeper causal model can tell positions apart without any position information.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from .expect import REACHES, STEADY, NotApplicable, Where, advise, fail, needs, note
from .probes.ablation import blocks_of, one_block
from .probes.influence import call, length, moved, some_of
from .probes.long import telling_places
from .probes.module_state import held_outside
from .probes.precision import precise, spread
from .probes.preconditions import expect_causal
from .subject import EXISTENCE, Subject
from .watch.attention import Products, key_products, mentions_rotary
from .watch.location import locate

SMALLEST = 1e-6  # standard deviations of the logits: exchanging two tokens must change more (correct models: 2e-3)
TURNED = 1e-4  # of a cosine. Angles are usually computed in float32; in bfloat16 the difference is 1e-2
PAST_CONVOLUTION = 4  # tokens after which a short convolution of equal tokens is constant

NAMED = re.compile(r"(?<![a-z])(pos|position|positions|wpe|pe|freqs|alibi|rope|rotary)(?![a-z])")
KIND = re.compile(r"rotary|rope(?![a-z])|alibi|sinusoid|learnedpos", re.IGNORECASE)
LONG = 40  # tokens: beyond powers of two, at which positions may wrap around
BEYOND_256 = 264  # tokens
LONGER = 131  # tokens; here only some pairs are tried


@needs(*STEADY, REACHES)
def check_order_of_tokens_matters(subject: Subject) -> None:
    """In one block, exchanging any two tokens must change the logits after them."""
    expect_causal(subject)
    sizes = dict(block_size=LONG) if subject.can_vary("block_size") else {}
    T = min(sizes.get("block_size", subject.sizes.block_size), LONG)
    if T < 3:
        raise NotApplicable(f"{T} tokens are too few: two are exchanged and a third one is observed")
    pairs = pairs_to_exchange(T)
    if (n := subject.affordable(2 * T, len(pairs), sweeps=2)) < len(pairs):
        pairs = some_of(pairs, n, seed=subject.seed)
        note(sample=f"{n} pairs of positions, drawn by the seed: the others were not looked at")
    best = torch.zeros(len(pairs), dtype=torch.float64)
    for scheme in EXISTENCE:
        model = one_block(subject, scheme, **sizes)
        best = best.maximum(exchanges(subject, model, T, pairs))
        if bool((best > SMALLEST).all()):
            break
    note(least=float(best.min()), bound=SMALLEST, length=T)
    if sizes and bool((best > SMALLEST).all()):
        expect_far_places_differ(subject, positions_held(model))
        return
    alike = [pair for pair, move in zip(pairs, best.tolist(), strict=True) if not move > SMALLEST]
    mechanism = positions_held(model)
    if len(alike) == len(pairs) and mechanism is None:
        advise(
            "in one block the order of earlier tokens changes nothing: the model has no position information (NoPE?)"
        )
    elif alike:
        fail_alike(alike, pairs, T, mechanism)


def pairs_to_exchange(T: int) -> list[tuple[int, int]]:
    """Neighbours, and two tokens with every later one; the last token is kept to observe the exchange."""
    neighbours = {(a, a + 1) for a in range(T - 2)}
    return sorted(neighbours | {(a, b) for a in (0, min(3, T - 3)) for b in range(a + 1, T - 1)})


def expect_far_places_differ(subject: Subject, mechanism: str | None) -> None:
    pairs = [(0, b) for b in range(LONG, LONGER - 1, 3)] + [(0, 64), (1, 65), (0, 128), (1, 129)]
    pairs += [(place - 1, place) for place in telling_places(LONGER) if LONG < place < LONGER - 1]
    moves = exchanges(subject, one_block(subject, EXISTENCE[1], block_size=LONGER), LONGER, pairs)
    alike = [pair for pair, move in zip(pairs, moves.tolist(), strict=True) if not move > SMALLEST]
    if alike:
        fail_alike(alike, pairs, LONGER, mechanism)


def exchanges(subject: Subject, model: nn.Module, T: int, pairs: list[tuple[int, int]]) -> Tensor:
    """The largest change of later logits when each pair is exchanged, in standard deviations of the logits."""
    V = subject.sizes.vocab_size
    tokens = subject.tokens(len(pairs), T, seed=subject.seed)
    swapped = tokens.clone()
    for row, (a, b) in enumerate(pairs):
        if tokens[row, a] == tokens[row, b]:
            tokens[row, b] = (tokens[row, b] + 1) % V
        swapped[row, a], swapped[row, b] = tokens[row, b], tokens[row, a]
    before = call(subject, model, tokens)
    moves = moved(before, call(subject, model, swapped)).cpu() / spread(before)
    return torch.stack([moves[row, b + 1 :].max() for row, (_, b) in enumerate(pairs)])


def positions_held(model: nn.Module) -> str | None:
    """The name of whatever gives the model positions: a table, angles, a module named so. Position ids do not count."""
    held: list[tuple[str, Any]] = [(held.name, held.value) for held in held_outside(model)]
    named = [*model.named_parameters(), *model.named_buffers(), *held]
    tensors = [name for name, x in named if isinstance(x, nn.Module) or x.is_floating_point() or x.is_complex()]
    kinds = [
        (name.rpartition(".")[2], type(m).__name__, f"{name} ({type(m).__name__})") for name, m in model.named_modules()
    ]
    known = [says for last, kind, says in kinds if KIND.search(f"{last} {kind}") and not kind.startswith("No")]
    return next(iter(known + [name for name in tensors if KIND.search(name) or NAMED.search(name)]), None)


def fail_alike(alike: list[tuple[int, int]], pairs: list[tuple[int, int]], T: int, mechanism: str | None) -> None:
    (a, b), all_of_them = alike[0], len(alike) == len(pairs)
    again = "positions-start-again-at-128" if b - a == 128 else "positions-start-again"
    likely: tuple[str, ...] = (again, "positions-clamped", "rope-half-precision")
    if all_of_them:
        likely = ("rope-on-the-wrong-axis", "rope-only-on-q", "prefill-all-same-position")
        if not KIND.search(mechanism or ""):
            likely = ("position-not-added", "position-constant", *likely)
    fail(
        f"in one block, exchanging tokens {a} and {b} of {T} changes no later logit by more than {SMALLEST:.0e} "
        f"standard deviations. The same holds for {'all' if all_of_them else f'{len(alike)} of'} {len(pairs)} pairs "
        f"tried: {'order has no effect' if all_of_them else 'these positions look the same'}, although the model "
        f"{f'has {mechanism}' if mechanism else 'tells other positions apart'}",
        likely=likely,
        advice="Print the positions (or rotary angles) that reach attention for 5 tokens: all five should differ.",
        first={"a": a, "b": b},
        pairs=alike[:40],
        mechanism=mechanism,
    )


@needs(*STEADY, "check_positions.check_order_of_tokens_matters")
def check_rotary_angle_depends_on_distance(subject: Subject) -> None:
    """With rotary positions, the score of two equal tokens must depend only on the distance between them."""
    model, T = precise(subject, None), length(subject)
    if not mentions_rotary(subject, model):
        raise NotApplicable("no name in the model's code speaks of rotary positions")
    tokens = subject.tokens(1, 1, seed=subject.seed).expand(1, T).contiguous()
    products = key_products(model, blocks_of(model), T, lambda: call(subject, model, tokens))
    if not products or T <= PAST_CONVOLUTION + 2:
        raise NotApplicable(
            "no product of queries and keys was seen, or equal tokens entered attention as different vectors"
        )
    drifts = {}
    for block, measures in products.items():
        drifts[block] = min(map(toeplitz_drift, measures.values()), key=lambda drift: float(drift.max()))
    note(drift={block: float(drift.max()) for block, drift in drifts.items()}, bound=TURNED)
    for block, drift in drifts.items():
        if float(drift.max()) > TURNED:
            t, s = (int(i) for i in (drift > TURNED).nonzero()[0][-2:])
            fail_turned(locate(model, block), float(drift.max()), t + PAST_CONVOLUTION, s + PAST_CONVOLUTION)


def fail_turned(where: Where, drift: float, t: int, s: int) -> None:
    fail(
        f"the rotation in {where.module} is not relative: with equal tokens everywhere, the score of query {t} and key "
        f"{s} differs from that of query {t - 1} and key {s - 1}, at the same distance. Cosines differ by up to "
        f"{drift:.3g}, allowed {TURNED:.0e}",
        where=where,
        likely=("rope-opposite-signs", "rope-only-on-q", "rope-only-on-k", "rope-pairing-mismatch"),
        advice="Rotate queries and keys with the same function, and lay out cosines and sines as the pairs are laid "
        "out.",
        first={"t": t, "s": s},
    )


@needs(*STEADY, "check_positions.check_rotary_angle_depends_on_distance")
def check_rotary_positions_stay_apart_in_bfloat16(subject: Subject) -> None:
    """With weights in bfloat16, no two neighbouring positions may be rotated by the same angles.

    In bfloat16 there is no whole number between 256 and 258: positions, and angles, are to be computed in float32.
    Buffers keep their type: a table of frequencies may be meant to stay in float32.
    """
    sizes: dict[str, Any] = dict(block_size=BEYOND_256) if subject.can_vary("block_size") else {}
    if not sizes and (subject.longest or BEYOND_256) < BEYOND_256:
        raise NotApplicable(f"the model reads fewer than {BEYOND_256} tokens")
    if not subject.affordable(BEYOND_256, 1, least=0):
        raise NotApplicable(f"{BEYOND_256} tokens in bfloat16 take too long")
    model = subject.build(seed=subject.seed, **sizes)
    model = model if subject.builds_afresh else copy.deepcopy(model)  # how a copy was built is not known
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    if not mentions_rotary(subject, model):
        raise NotApplicable("no name in the model's code speaks of rotary positions")
    tokens = subject.tokens(1, 1, seed=subject.seed).expand(1, BEYOND_256).contiguous()
    try:
        with torch.no_grad(), Products(BEYOND_256) as seen:
            call(subject, model, tokens)
    except RuntimeError as error:  # which check_numerics tells, where it is a mistake
        raise NotApplicable(f"the model does not run with weights in bfloat16: {str(error)[:100]}") from None
    for query, _ in seen.found[:1]:
        alike = (query[..., 1:, :] == query[..., :-1, :]).all(-1).flatten(0, -2).all(0)  # [T - 1]
        far = alike[BEYOND_256 // 2 :].nonzero()
        if len(far) and not alike[: BEYOND_256 // 4].any():
            t = BEYOND_256 // 2 + int(far[0])
            fail(
                f"with weights in bfloat16, positions {t} and {t + 1} are rotated alike ({len(far)} of the last "
                f"{BEYOND_256 // 2} positions like the one before): equal tokens there are the same to attention",
                likely=("rope-angles-in-the-models-type",),
                advice="Compute positions, frequencies and angles in float32, whatever the type of x, and cast cosines "
                "and sines at the end.",
                first=t,
                alike=len(far),
            )


def toeplitz_drift(scores: Tensor) -> Tensor:
    """[..., T', T']: how far each score is from the score one query and one key earlier; the first few left out."""
    settled = scores[..., PAST_CONVOLUTION - 1 :, PAST_CONVOLUTION - 1 :]
    return (settled[..., 1:, 1:] - settled[..., :-1, :-1]).abs()
