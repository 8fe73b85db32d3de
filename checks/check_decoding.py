"""Decoding beyond the next token of one generate: further functions, penalties on tokens used, and beam search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .expect import APPENDS, GREEDY, REPEATS, SHAPE, NotApplicable, fail, needs, note
from .generation.beams import END, FIRST, best, chain, flat, log_probability
from .generation.calls import cached
from .generation.faults import explain
from .generation.further import further, on_each, told_of
from .generation.scripted import Stage, dealt, stage
from .probes.filled import judged
from .subject import Companion, Subject
from .watch.draws import seeded

CACHED = "check_cache.check_cached_decoding_equals_full"
FURTHER = "check_decoding.check_further_functions_follow_the_model"
SHORT = 1e-4  # nats by which a text may fall short of the likelier one
PROMPTS = 12
NEW = 4  # tokens after a prompt
STRONG = {"penalty": 4.0, "charge": 60.0}  # enough to turn a lead of 30 nats around
RUN = ((70.0, 40.0), (-40.0, -70.0))  # logits of the token used and of the next likeliest one; all others are below
LOWEST = -400.0


@needs(SHAPE, REPEATS, CACHED)
def check_further_functions_follow_the_model(subject: Subject) -> None:
    """A function that generates beside generate must append the tokens asked for, each the one the model is sure of."""
    if not further(subject):
        raise NotApplicable("your file has no function that generates beside generate")

    def follow(one: Companion) -> int:
        with told_of(one):
            on, n = stage(subject, one), NEW
            prompts = on.prompts(2, min(3, subject.sizes.block_size - n), n)
            want, got = on.naive(prompts, n).tolist(), on.greedy(prompts, n)
            for row, new in enumerate(got):
                if len(new) != n:
                    fail(
                        f"asked for {n} new tokens, row {row} has {len(new)}: {new}",
                        likely=("generate-length-off-by-one",),
                        advice="Append one token in each of max_new_tokens steps, and return them all.",
                    )
            if got != want:
                explain(on, prompts, got, want, turn=0)
        return n

    note(new_tokens=judged(subject, "generation", judge=follow))


@needs(APPENDS, GREEDY, FURTHER)
def check_a_penalty_makes_no_used_token_likelier(subject: Subject) -> None:
    """A penalty on tokens already used must make them less likely, whether their logits are positive or negative."""
    on_each(subject, judge_penalties)


def judge_penalties(on: Stage) -> None:
    asked: dict[str, Any] = {role: value for role, value in STRONG.items() if role in on.decoder.takes}
    if not asked:
        raise NotApplicable(f"{on.decoder.name} has no parameter for a penalty on repeated tokens")
    for role, value in asked.items():
        name = on.decoder.takes[role]
        try:
            said = [after_used(on, lead, **{role: value}) for lead in RUN]
        except Exception as error:  # a range of its own
            raise NotApplicable(f"{on.decoder.name} refuses {name}={value:g}: {error}") from None
        note(**{name: said})
        unused = 2
        lowered = [unused in tokens for tokens in said]
        if lowered[0] != lowered[1]:
            wrong = lowered.index(False)
            x, y = RUN[wrong]
            fail(
                f"with {name}={value:g}, a used token with logit {x:g} is chosen again over an unused one with {y:g} "
                f"(new tokens {said[wrong]}), should fall behind it, as it does with logits of {RUN[1 - wrong][0]:g} "
                f"and {RUN[1 - wrong][1]:g}: the penalty makes used tokens likelier where logits are "
                f"{'negative' if wrong else 'positive'}",
                likely=("penalty-divides-negative-logits",),
                advice="Divide positive logits and multiply negative ones: "
                "torch.where(x > 0, x / penalty, x * penalty).",
                said=said[wrong],
                logits=[x, y],
            )
        decided = {"sample", "greedy", "top_k"} & on.decoder.takes.keys()
        if decided and not any(lowered) and unused not in after_used(on, (5.0, 4.0), greedy=True, **{role: value}):
            fail(
                f"with {name}={value:g}, a used token with logit 5 is chosen again and again over an unused one with "
                "logit 4: the penalty has no effect, or the opposite one",
                likely=("penalty-ignored",),
                advice="Apply it to the logits of the tokens in the text so far, before the softmax.",
            )


def after_used(on: Stage, lead: tuple[float, float], *, greedy: bool = False, **options: Any) -> list[int]:
    """Two new tokens after a prompt of token 1, where tokens 1 and 2 always have these logits and no other is near.

    Some penalties count new tokens only: the second new token is then the first that one applies to.
    """
    given = torch.full((1, on.vocab_size), LOWEST, dtype=torch.float64)
    given[0, 1], given[0, 2] = lead
    on.script = dealt(given)
    prompt = torch.ones(1, 2, dtype=torch.long, device=on.subject.device)
    if greedy and "top_k" in on.decoder.takes:
        options["top_k"] = 1
    with seeded(on.subject.seed):
        return (on.greedy if greedy else on.generate)(prompt, 2, **options)[0]


@needs(APPENDS, GREEDY, FURTHER)
def check_beam_search_finds_the_likeliest(subject: Subject) -> None:
    """Beam search must find a text at least as likely as a search with as many beams that reads every text whole."""
    on_each(subject, judge_search)


def judge_search(on: Stage) -> None:
    subject = on.subject
    on.decoder.wants("beams")
    if on.banned:
        raise NotApplicable(f"{on.decoder.name} never gives {on.banned}, which the naive search would")
    on.script, n = flat(on), max(1, min(8, subject.sizes.block_size - 3))
    rows = subject.affordable(8 * n * n, PROMPTS, least=4)
    tried = []
    for beams in (1, 3, 5):
        for first in range(0, rows, 4):
            prompts = subject.tokens(rows, 3, seed=subject.seed)[first : first + 4]
            said = on.greedy(prompts, n, beams=beams)
            if [len(row) for row in said] != [n] * len(prompts):
                raise NotApplicable(f"{on.decoder.name} returns other than one text of {n} new tokens per prompt")
            got = torch.tensor(said, device=prompts.device)
            want, size = best(on, prompts, n, beams), log_probability(on, prompts, got)
            short = size < log_probability(on, prompts, want) - SHORT
            if bool(short.any()):
                judge_beams(on, prompts, got, want, int(short.int().argmax()), beams)
        tried.append(beams)
    note(beams=tried, new_tokens=n)


def judge_beams(on: Stage, prompts: Tensor, got: Tensor, want: Tensor, row: int, beams: int) -> None:
    n, mine = want.shape[1], prompts[row : row + 1]
    found, better = (float(log_probability(on, mine, text[row : row + 1])) for text in (got, want))
    alone = torch.equal(got[row], best(on, mine, n, 1)[0]) and beams > 1
    cause, likely = "", list[str]()
    advice = "Keep the sum of log-probabilities of every beam, and choose among all beams' tokens."
    if alone:
        cause, likely = ": it is what greedy decoding gives, so the beams are all alike", ["beams-all-alike"]
        advice = "Start with one live beam: give the others a score of -inf before the first step."
    elif cached(on.reads) and beams > 1:
        cause = ": each step reads one token over a cache, which must follow the beams when they change places"
        likely = ["beams-keep-old-caches"]
        advice = "After every step reorder the cache by the beam each text came from: keys[beam], values[beam]."
    fail(
        f"with {beams} beams, row {row} of {len(prompts)} gives {got[row].tolist()}, a text of log-probability "
        f"{found:.4g}; a search with {beams} beams that reads every text whole finds {want[row].tolist()}, of "
        f"{better:.4g}{cause}",
        likely=likely,
        advice=advice,
        beams=beams,
        said=got[row].tolist(),
        better=want[row].tolist(),
        log_probabilities=[found, better],
    )


@needs(APPENDS, GREEDY, FURTHER)
def check_beam_length_is_that_of_the_new_tokens(subject: Subject) -> None:
    """Among beams of several lengths, the choice must not depend on how often the prompt is repeated in front."""
    on_each(subject, judge_length)


def judge_length(on: Stage) -> None:
    subject = on.subject
    on.decoder.wants("beams", "end")
    long = subject.sizes.block_size - NEW
    if long < 6:
        raise NotApplicable(f"a block size of {subject.sizes.block_size} is too short for prompts of two lengths")
    lengths = (2, min(long, 8))
    options: dict[str, Any] = {"end": on.decoder.end_value(END), "beams": 3}
    if "length_penalty" in on.decoder.takes:
        options["length_penalty"] = 1.0
    said = {}
    for likely_end in (0.35, 0.45, 0.55):
        on.script = chain(on.vocab_size, likely_end, NEW)
        for length in lengths:
            prompt = torch.full((1, length), FIRST, dtype=torch.long, device=subject.device)
            new = on.greedy(prompt, NEW, **options)[0]
            said[length] = new[: new.index(END)] if END in new else new
        if said[lengths[0]] != said[lengths[1]]:
            break
    one, other = (len(said[length]) for length in lengths)
    note(new_tokens=[one, other])
    if said[lengths[0]] == said[lengths[1]]:
        return
    fail(
        f"after a prompt of {lengths[0]} tokens the best beam has {one} new tokens before its end, after the same "
        f"prompt repeated to {lengths[1]} tokens it has {other}, although the model gives the same probabilities: the "
        "length by which a beam's score is divided counts the prompt",
        likely=("beam-length-counts-prompt",),
        advice="Divide by the number of new tokens: (len(ids) - len(prompt)) ** length_penalty.",
        prompts=list(lengths),
        new_tokens=[one, other],
    )
