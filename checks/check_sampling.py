"""Sampling: tokens are drawn from softmax(logits / temperature), cut to what top-k and top-p keep.

The model returns the same known logits after every text. The weights passed to torch.multinomial are recorded, so the
comparison is exact; a sampler that does not call it is judged by a χ² test of its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .expect import APPENDS, GREEDY, NotApplicable, advise, fail, needs, note
from .generation.draws import DISTINCT, LEVEL, Sampler, apart, nucleus, renormalized, scores, unlikely
from .generation.met_generate import Rows
from .generation.scripted import Stage, dealt, stage
from .subject import Subject
from .watch.draws import seeded

TEMPERATURE = "check_sampling.check_temperature_divides_the_logits"
EXACT = 1e-4  # probabilities in float32 are exact to 1e-6; one token more or less changes them by 1e-2
ADVICE = "Use probabilities = (logits / temperature).softmax(-1), then torch.multinomial(probabilities, 1)."


def sampler(subject: Subject, *roles: str) -> Sampler:
    """Known logits for as many rows as the vocabulary has tokens, if possible: B = V shows a threshold of shape [B].

    Raises NotApplicable for a generate without the parameters, and for one that never samples.
    """
    on = stage(subject)
    on.decoder.wants(*roles)
    rows = 1 if not on.decoder.batched else on.vocab_size if on.vocab_size <= 32 else 3
    made = Sampler(on, scores(on.vocab_size, rows, seed=subject.seed))
    samples = {"temperature", "sample", "greedy", "top_k", "top_p"} & on.decoder.takes.keys()
    if not samples and ("beams" in on.decoder.takes or draws_nothing(made)):
        raise NotApplicable(f"{on.decoder.name} always takes the likeliest token and has no option to sample")
    return made


def draws_nothing(made: Sampler) -> bool:
    counts = made.counts({})
    return int(counts.max()) == int(counts.sum()) and int(counts.argmax()) == int(made.given[0].argmax())


@needs(APPENDS, GREEDY)
def check_temperature_divides_the_logits(subject: Subject) -> None:
    """Tokens must be drawn with probability softmax(logits / T): at T = 1, and at 0.5 and 2 if T can be set."""
    made = sampler(subject)
    asked = (1.0, 0.5, 2.0) if "temperature" in made.on.decoder.takes else (1.0,)
    for temperature in asked:
        options = {"sample": True, "temperature": temperature}
        kept = made.kept(options)
        if kept is None:
            judge_counts(made, options, made.likeliest().shape[1], temperature)
        elif distance(kept, made.likeliest(temperature)) > EXACT:
            judge_temperature(made, kept, temperature)
    note(temperatures=list(asked), seen="weights" if kept is not None else "counts")


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().nan_to_num(nan=torch.inf).max())


def judge_temperature(made: Sampler, kept: Tensor, temperature: float) -> None:
    """Fails with the factor that the logits were multiplied by, which should be 1 / T."""
    whole = made.likeliest()
    inside = (kept[0] > 0) & (whole[0] > 1e-4)
    x, y = whole[0, inside].log(), kept[0, inside].log()
    power = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    drawn, V = int((kept[0] > 0).sum()), kept.shape[1]
    other = other_weights(made, kept)
    if other and temperature == 1:
        fail(
            f"tokens are drawn in proportion to {other}: the likeliest token has probability {float(kept[0, 0]):.4f}, "
            f"should have {float(whole[0, 0]):.4f}",
            likely=("multinomial-of-other-weights",),
            advice=ADVICE,
            drawn_by=other,
        )
    if abs(power * temperature - 1) < 0.02:
        off = (kept[0] - made.likeliest(temperature)[0]).abs()
        place = int(off.argmax())
        fail(
            f"at temperature {temperature:g} the token of rank {place + 1} has probability "
            f"{float(kept[0, place]):.5f}, should have {float(made.likeliest(temperature)[0, place]):.5f}: the "
            "probabilities are changed after the softmax",
            advice="Use probabilities = (logits / temperature).softmax(-1), and change nothing after it.",
            temperature=temperature,
        )
    fewer = f", and only {drawn} of {V} tokens can be drawn" if drawn < V else ""
    known = {temperature: "temperature-multiplied", 1.0: "temperature-ignored"}
    fail(
        f"at temperature {temperature:g} the logits are multiplied by {power:.3g}, not by {1 / temperature:g}{fewer}: "
        f"the likeliest token has probability {float(kept[0, 0]):.4f}, should have "
        f"{float(made.likeliest(temperature)[0, 0]):.4f}",
        likely=[bug for value, bug in known.items() if abs(power - value) < 0.05 and temperature != 1],
        advice=ADVICE,
        temperature=temperature,
        multiplied_by=round(power, 4),
        right=1 / temperature,
    )


def other_weights(made: Sampler, kept: Tensor) -> str:
    """The known function of the logits that the tokens are drawn by, if not their softmax; else empty."""
    x = made.given
    known = {
        "the logits themselves, without a softmax": x - x.amin(-1, keepdim=True),
        "the sigmoid of the logits": x.sigmoid(),
        "a softmax over rows": x.softmax(0),
        "the softmax of the softmax": x.softmax(-1).softmax(-1),
        "equal weights, whatever the logits": torch.ones_like(x),
    }
    for name, weights in known.items():
        mine = (weights / weights.sum(-1, keepdim=True)).sort(-1, descending=True).values
        if len(kept) == len(mine) and distance(kept, mine) < EXACT:
            return name
    return ""


def judge_counts(made: Sampler, options: dict[str, Any], kept: int, temperature: float = 1.0) -> None:
    """Fails if the tokens that came out do not have the probabilities of the `kept` likeliest, in two χ² tests."""
    right, p_values = made.first_row(kept, temperature), []
    for draw in range(2):
        counts = made.counts(options, draw=draw)
        p_values.append(unlikely(counts, right))
        if p_values[-1] > LEVEL:
            note(p_value=p_values[-1])
            return
    if int((counts > 0).sum()) == 1 and float(right.max()) < 0.9:
        fail(
            f"asked to sample, {made.on.decoder.name} gives the same token in all {int(counts.sum())} draws"
            + (", the likeliest: it is greedy" if int(counts.argmax()) == int(right.argmax()) else ""),
            likely=("sampling-is-greedy",),
            advice="Draw where sampling is asked for: torch.multinomial(probabilities, 1).",
        )
    outside = int(((right == 0) & (counts > 0)).sum())
    asked = ", ".join(f"{name}={value}" for name, value in options.items() if name != "sample")
    fail(
        f"with {asked}, {int(counts.sum())} draws give {int((counts > 0).sum())} different tokens, "
        + (f"{outside} of them not among the {kept} likeliest" if outside else "with the wrong frequencies")
        + f" (two χ² tests: p = {p_values[0]:.1e} and {p_values[1]:.1e})",
        advice="Use probabilities = (logits / temperature).softmax(-1), cut to what the filters keep and renormalized.",
        different=int((counts > 0).sum()),
        outside=outside,
        p_values=p_values,
    )


@needs(APPENDS, GREEDY, TEMPERATURE)
def check_top_k_keeps_k(subject: Subject) -> None:
    """Top-k must keep exactly the k likeliest tokens of each row, in the right proportions, for k = 1 to V."""
    made = sampler(subject, "top_k")
    V = min(made.on.vocab_size, DISTINCT)
    for k in (3, *(k for k in range(1, V + 1) if k != 3)):
        options = {"sample": True, "top_k": k}
        kept, whole = drawn_from(made, options), made.likeliest()
        if kept is None:
            if k in (1, 3, V):
                judge_counts(made, options, k)
            continue
        want = renormalized(whole, torch.full((len(whole),), k))
        if distance(kept, want) > EXACT:
            judge_kept(made, kept, torch.full((len(whole),), k), f"top_k={k}", top_k_bugs(kept, k))
    beyond_the_vocabulary(made)


def top_k_bugs(kept: Tensor, k: int) -> tuple[str, ...]:
    sizes = set((kept > 0).sum(dim=-1).tolist())
    return {
        frozenset({k + 1}): ("topk-off-by-one-more",),
        frozenset({k - 1}): ("topk-strict-inequality",),
        frozenset({k}): ("topp-mask-not-unsorted",),
    }.get(frozenset(sizes), ("topk-threshold-of-another-row",) if len(sizes) > 1 else ())


def beyond_the_vocabulary(made: Sampler) -> None:
    try:
        made.kept({"sample": True, "top_k": made.on.vocab_size + 1})
    except Exception as error:
        advise(f"a top_k above the vocabulary size raises {type(error).__name__}: use min(top_k, logits.size(-1))")


def drawn_from(made: Sampler, options: dict[str, Any]) -> Tensor | None:
    """As `Sampler.kept`; a filter that fails only for a batch is used one prompt at a time, with advice."""
    try:
        return made.kept(options)
    except Exception as error:
        if len(made.given) == 1:
            raise
        made.given, made.prompts = made.given[:1], made.prompts[:1]
        kept = made.kept(options)
        asked = ", ".join(f"{name}={value}" for name, value in options.items() if name != "sample")
        advise(f"with {asked}, {made.on.decoder.name} works for one prompt only: {type(error).__name__}: {error}")
        return kept


def judge_kept(
    made: Sampler, kept: Tensor, size: Tensor, asked: str, likely: tuple[str, ...], temperature: float = 1.0
) -> None:
    """Fails with the first row that is not drawn from exactly its `size` likeliest tokens."""
    want = renormalized(made.likeliest(temperature), size)
    row = int(((kept - want).abs().nan_to_num(nan=torch.inf).amax(dim=-1) > EXACT).int().argmax())
    got, right = int((kept[row] > 0).sum()), int(size[row])
    if got == right and even(kept[row]):
        what = f"keeps the right {got} tokens, but in the wrong proportions: the first has probability "
        what += f"{float(kept[row, 0]):.4f}, should have {float(want[row, 0]):.4f}"
    elif distance(kept[row], made.likeliest(temperature)[row]) < EXACT:
        what = f"keeps all {got} tokens, should keep {right}: it is not applied to the first new token"
    elif got == kept.shape[1] > right:
        what = f"keeps all {got} tokens, should keep {right}: tokens that are cut can still be drawn (set their logits "
        what += "to -∞, not to 0)"
    elif got == right:
        what = f"keeps {got} tokens, but not the likeliest: after the cut the first has probability "
        what += f"{float(kept[row, 0]):.4f}, should have {float(want[row, 0]):.4f}"
        if row > 0:
            what += f"; row{'s 0 to' if row > 1 else ''} {row - 1} of the same batch {'are' if row > 1 else 'is'} right"
            likely = ("topp-order-of-row-zero", *likely)
    else:
        what = f"keeps {got} tokens, should keep {right}"
    fail(
        f"{asked} {what} (row {row} of {len(kept)}, vocabulary of {kept.shape[1]})",
        likely=likely,
        advice="Print the sorted probabilities of one row before and after the cut: the likeliest must remain.",
        row=row,
        kept=got,
        should_keep=right,
        kept_by_row=(kept > 0).sum(dim=-1).tolist()[:8],
    )


def even(kept: Tensor) -> bool:
    """Whether all tokens kept are equally likely, which they never are in a distribution without ties."""
    inside = kept[kept > 0]
    return len(inside) > 1 and bool(inside.max() - inside.min() < EXACT)


@needs(APPENDS, GREEDY, TEMPERATURE)
def check_top_p_keeps_the_nucleus(subject: Subject) -> None:
    """Top-p must keep exactly the smallest set of likeliest tokens whose probabilities reach p, from tiny p to 1."""
    made = sampler(subject, "top_p")
    for p in (0.7, 1e-6, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0):
        whole = made.likeliest()
        p = p if p in (1e-6, 0.999, 1.0) else apart(whole, p)
        size = nucleus(whole, p)
        options = {"sample": True, "top_p": p}
        kept = drawn_from(made, options)
        whole, size = whole[: len(made.given)], size[: len(made.given)]
        if kept is None:
            judge_counts(made, options, int(size[0]))
        elif distance(kept, renormalized(whole, size)) > EXACT:
            judge_kept(made, kept, size, f"top_p={p:g}", top_p_bugs(whole, kept, size, p))


def top_p_bugs(whole: Tensor, kept: Tensor, size: Tensor, p: float) -> tuple[str, ...]:
    found = (kept > 0).sum(dim=-1)
    if bool((found == size).all()):
        return ("topp-mask-not-unsorted",)
    if bool((found == (size - 1).clamp(min=1)).all()):
        return ("topp-drops-crossing-token",)
    if bool((found == nucleus(whole, 1 - p)).all()):
        return ("topp-threshold-inverted",)
    return ("topp-mask-not-unsorted", "topp-threshold-inverted")


@needs(
    APPENDS, GREEDY, TEMPERATURE, "check_sampling.check_top_k_keeps_k", "check_sampling.check_top_p_keeps_the_nucleus"
)
def check_filters_work_together(subject: Subject) -> None:
    """Top-k, top-p and temperature must all apply when given together, and the token drawn must be the one returned."""
    made = sampler(subject)
    takes = made.on.decoder.takes.keys()
    if {"top_k", "top_p"} <= takes:
        for k, p in ((4, 0.9), (8, 0.4), (3, 0.5)):
            expect_both(made, k, p)
    if {"top_k", "temperature"} <= takes:
        expect_cut_and_divided(made, 4, 0.5)
    if {"top_p", "temperature"} <= takes:
        for temperature in (0.5, 2.0):
            expect_nucleus_at(made, 0.7, temperature)
    asked = [{}, *({role: value} for role, value in (("top_k", 5), ("top_p", 0.6)) if role in takes)]
    for options in asked:
        expect_drawn_is_returned(made, {"sample": True, **options})


def expect_both(made: Sampler, k: int, p: float) -> None:
    """Either order is in use: the nucleus of the k likeliest, or the tokens in both the nucleus and the k likeliest."""
    whole = made.likeliest()
    among = nucleus(renormalized(whole, torch.full((len(whole),), k)), p)
    shared = nucleus(whole, p).clamp(max=k)
    kept = drawn_from(made, {"sample": True, "top_k": k, "top_p": p})
    whole, among, shared = (x[: len(made.given)] for x in (whole, among, shared))
    if kept is None:
        raise NotApplicable("the sampler does not call torch.multinomial")
    if min(distance(kept, renormalized(whole, size)) for size in (among, shared)) <= EXACT:
        return
    found = (kept > 0).sum(dim=-1)
    ignored = "top_p" if bool((found == k).all()) else "top_k" if bool((found == nucleus(whole, p)).all()) else ""
    fail(
        f"top_k={k} with top_p={p:g} keeps {int(found[0])} tokens, should keep {int(among[0])}"
        + (f" (or {int(shared[0])}, if top_p comes first)" if int(shared[0]) != int(among[0]) else "")
        + (f": {ignored} is ignored when both are given" if ignored else ""),
        likely=("topk-skips-topp",) if ignored == "top_p" else (),
        advice="Apply one filter after the other to the logits, and draw once.",
        kept=int(found[0]),
        ignored=ignored,
    )


def expect_cut_and_divided(made: Sampler, k: int, temperature: float) -> None:
    kept = drawn_from(made, {"sample": True, "top_k": k, "temperature": temperature})
    if kept is None:
        return judge_counts(made, {"sample": True, "top_k": k, "temperature": temperature}, k, temperature)
    want = renormalized(made.likeliest(temperature), torch.full((len(kept),), k))
    if distance(kept, want) > EXACT:
        if len(set((kept > 0).sum(dim=-1).tolist())) > 1:
            asked = f"top_k={k} at temperature {temperature:g}"
            judge_kept(made, kept, torch.full((len(kept),), k), asked, top_k_bugs(kept, k), temperature)
        fail(
            f"top_k={k} at temperature {temperature:g}: the likeliest token has probability "
            f"{float(kept[0, 0]):.4f}, should have {float(want[0, 0]):.4f}, so one of the two is ignored",
            advice="Divide the logits by the temperature, cut them to the top k, and apply one softmax.",
            kept=int((kept[0] > 0).sum()),
        )


def expect_nucleus_at(made: Sampler, p: float, temperature: float) -> None:
    """The nucleus is that of the distribution from which tokens are drawn, the one at this temperature."""
    whole = made.likeliest(temperature)
    p = apart(torch.cat((whole, made.likeliest())), p)
    size, before = nucleus(whole, p), nucleus(made.likeliest(), p)
    options = {"sample": True, "top_p": p, "temperature": temperature}
    kept = drawn_from(made, options)
    whole, size, before = (x[: len(made.given)] for x in (whole, size, before))
    if kept is None:
        return judge_counts(made, options, int(size[0]), temperature)
    if distance(kept, renormalized(whole, size)) <= EXACT:
        return
    asked = f"top_p={p:g} at temperature {temperature:g}"
    if distance(kept, renormalized(whole, before)) > EXACT:
        judge_kept(made, kept, size, asked, (), temperature)
    row = int((before != size).int().argmax())
    fail(
        f"{asked} keeps {int(before[row])} tokens, the nucleus at temperature 1; the distribution that is drawn from "
        f"reaches {p:g} with {int(size[row])} (row {row} of {len(kept)}): top-p is measured before the temperature",
        likely=("topp-before-temperature",),
        advice="Divide the logits by the temperature first, then sort, sum and cut them.",
        row=row,
        kept=int(before[row]),
        should_keep=int(size[row]),
    )


def expect_drawn_is_returned(made: Sampler, options: dict[str, Any]) -> None:
    """Whatever index multinomial draws, the token of that probability must be returned."""
    order = made.given.argsort(dim=-1, descending=True)
    for place in range(min(made.on.vocab_size, DISTINCT)):
        weights, returned = made.catch(place, **options)
        if len(weights) != len(returned):
            return
        if place >= weights.shape[1]:
            break
        rank = (weights > weights[:, place : place + 1]).sum(dim=-1)
        want = order.gather(-1, rank[:, None])[:, 0]
        wrong = (weights[:, place] > 0) & (returned != want)
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            fail(
                f"row {row} drew token {int(want[row])} (probability "
                f"{float(weights[row, place] / weights[row].sum()):.4f}) but returns token {int(returned[row])}",
                likely=("topk-answers-a-place",) if int(returned[row]) == place else ("same-token-for-whole-batch",),
                advice="Map the drawn index back after a sort: order.gather(-1, drawn).",
                row=row,
                drawn=int(want[row]),
                said=int(returned[row]),
            )


@needs(APPENDS, GREEDY)
def check_temperature_zero_is_greedy(subject: Subject) -> None:
    """Temperature 0 must take the likeliest token, or raise an error."""
    on = stage(subject)
    on.decoder.wants("temperature")
    rows = 1 if not on.decoder.batched else 5
    for shift in (0.0, 4.0):  # dividing by zero leaves only signs: all logits negative, then some positive
        given = scores(on.vocab_size, rows, seed=subject.seed + 2) + shift
        on.script = dealt(given)
        try:
            got = on.generate(subject.tokens(rows, 2, seed=subject.seed), 3, temperature=0.0)
        except Exception as error:
            advise(f"temperature 0 raises {type(error).__name__}: {error}. It could mean greedy: logits.argmax(-1)")
            return
        want = given.argmax(dim=-1).tolist()
        wrong = [row for row in range(rows) if got[row] != [want[row]] * 3]
        if wrong:
            fail(
                f"at temperature 0 row {wrong[0]} gives {got[wrong[0]]}, but the likeliest token is always "
                f"{want[wrong[0]]}: the logits are divided by zero",
                likely=("temperature-zero-division",),
                advice="Take logits.argmax(-1) if temperature == 0, and divide only otherwise.",
                row=wrong[0],
                said=got[wrong[0]],
                likeliest=want[wrong[0]],
            )


@needs(APPENDS, TEMPERATURE)
def check_samples_differ_unless_seeded(subject: Subject) -> None:
    """Two samples without a seed must differ, and the same seed must give the same sample."""
    made = sampler(subject)
    on, n = made.on, max(1, min(6, subject.sizes.block_size - 2))
    on.script = dealt(scores(on.vocab_size, 1, seed=subject.seed))
    prompts = subject.tokens(4, 2, seed=subject.seed)
    with seeded(subject.seed):
        one, two = (on.generate(prompts, n, sample=True) for _ in range(2))
    if one == two:
        judge_unseeded(on, one)
    expect_repeatable(on, prompts, n)


def judge_unseeded(on: Stage, sample: Rows) -> None:
    seed = on.decoder.defaults.get("seed")
    if seed is not None:
        advise(
            f"{on.decoder.name} has the default seed={seed}: every call gives the same sample unless a seed is passed"
        )
        return
    fail(
        f"two samples without a seed are the same {len(sample)} × {len(sample[0])} tokens ({sample[0]}, …): the "
        "generator is seeded inside, on every call",
        likely=("seed-fixed-inside-generate", "generate-reseeds-global-state"),
        advice="Accept a torch.Generator or a seed as an argument, and do not seed without one.",
        said=sample[0],
    )


def expect_repeatable(on: Stage, prompts: Tensor, n: int) -> None:
    for role, make in (("generator", lambda seed: torch.Generator().manual_seed(seed)), ("seed", lambda seed: seed)):
        if role not in on.decoder.takes:
            continue
        with seeded(on.subject.seed):
            samples = [on.generate(prompts, n, sample=True, **{role: make(seed)}) for seed in (5, 5, 6)]
        if samples[0] != samples[1]:
            fail(
                f"the same {role} gives {samples[0][0]} and then {samples[1][0]}: tokens are not drawn with it",
                likely=("generator-ignored",),
                advice="Pass it on: torch.multinomial(probabilities, 1, generator=generator).",
                said=[samples[0][0], samples[1][0]],
            )
        if samples[0] == samples[2]:
            fail(
                f"seeds 5 and 6 of {role} give the same sample {samples[0][0]}",
                likely=("seed-fixed-inside-generate",),
                advice="Look for a manual_seed, or a new generator, inside the call.",
            )
        return
    with seeded(7):
        one = on.generate(prompts, n, sample=True)
    with seeded(7):
        two = on.generate(prompts, n, sample=True)
    if one != two:
        advise(
            f"a sample of {on.decoder.name} cannot be repeated: it takes no generator or seed, and ignores "
            "torch.manual_seed"
        )
