"""The two sanity checks: a one-layer model learns a sentence by heart, then only the part of it that carries loss.

They train a fresh model of the subject; what they leave behind (curves, samples, weights) is kept for the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..transformer.data import SentenceTask
from ..transformer.generation import generate
from .expect import READ_ALONE, READABLE, NotApplicable, advise, fail, needs
from .generation.met_generate import Decoder, decoder
from .loss.given import cross_entropy_line, gives
from .subject import Subject
from .training.runs import refuse_chance
from .training.sentence import LEARNED, Learned, Speak, learn, loss_of

SKIP = 3  # in the second check the first three targets, "I", " " and "l", carry no loss
NOT_LEARNED = 1.0  # nats a target that nothing taught
TEMPERATURE, REPEATS = 0.1, 10


def sanity(check: Callable) -> Callable:
    check.sanity = True  # type: ignore[attr-defined]
    return check


@sanity
@needs(*READABLE, *READ_ALONE)
def check_memorizes_the_sentence(subject: Subject) -> None:
    """A one-layer model learns the sentence by heart: loss at most 1e-5, and the exact rest after every beginning."""
    learned = learn(subject, SentenceTask())
    expect_learned(subject, learned)
    recite_everything(subject, learned)


@sanity
@needs(*READABLE, *READ_ALONE)
def check_learns_only_unmasked_targets(subject: Subject) -> None:
    """With the first three targets masked, the others are learned to 1e-5 and the masked ones not at all."""
    learned = learn(subject, SentenceTask(skip=SKIP))
    expect_learned(subject, learned)
    expect_masked_targets_untaught(subject, learned)
    sentence = learned.task.sentence
    expect_recital(subject, learned, sentence[:SKIP])
    for observed in ("", sentence[:1]):
        learned.samples.append(("observed, not judged", observed, recite(subject, learned, observed)))


# judging


def expect_learned(subject: Subject, learned: Learned) -> None:
    if learned.loss <= LEARNED:
        return
    refuse_chance(subject, learned.trainer.model.train())
    start = learned.before["train"]
    if gives(subject) == "probabilities":
        fail(
            f"the model does not learn: from loss {start:.3g} to {learned.loss:.3g}, wanted {LEARNED:g}. It gives "
            "probabilities, and cross entropy makes a softmax of them again",
            where=cross_entropy_line(subject),
            likely=("softmax-twice",),
            advice="return the head's outputs without a softmax: cross_entropy makes it",
        )
    slowly = learned.loss < 0.1 * start
    verdict = "learns, but too slowly" if slowly else "does not learn"
    fail(
        f"the model {verdict}: from loss {start:.3g} to {learned.loss:.3g}, wanted {LEARNED:g} "
        f"({'; '.join(learned.tried)})",
        advice="look at the initialization, the norms and the gradient checks"
        if slowly
        else "look at the gradient checks: what does not learn has usually lost a gradient or its inputs",
        loss_before=start,
        loss_after=learned.loss,
        tried=learned.tried,
    )


def expect_masked_targets_untaught(subject: Subject, learned: Learned) -> None:
    """Their cross entropy stays high, and the logits that predict them get a gradient of exactly zero."""
    targets = ", ".join(repr(c) for c in learned.task.sentence[: learned.task.skip])
    if not learned.masked > NOT_LEARNED:
        fail(
            f"the masked targets {targets} were learned: their mean cross entropy is {learned.masked:.3g}, "
            f"and nothing that carries loss teaches them (expected above {NOT_LEARNED:g})",
            likely=("loss-mask-ignored", "masked-numerator-unmasked", "loss-mask-shifted-by-one"),
            advice="print which targets your loss keeps: the mask must line up with the targets, not with the inputs",
            masked_loss=learned.masked,
        )
    batch = learned.task.batch([learned.task.sentence]).to(subject.device)
    model = learned.trainer.model
    with torch.no_grad():
        logits = subject.logits(model, batch.tokens)
    logits = logits.detach().requires_grad_()
    loss = loss_of(subject)
    (gradient,) = torch.autograd.grad(loss(logits, batch.targets, batch.loss_mask), logits)
    wrong = [t for t in range(learned.task.skip) if bool(gradient[0, t].any())]
    if wrong:
        fail(
            f"the loss has a gradient at the masked targets {wrong} ({targets}): it must be exactly zero there, "
            f"the largest is {float(gradient[0, : learned.task.skip].abs().max()):.3g}",
            likely=("loss-mask-shifted-by-one", "loss-mask-ignored"),
            advice="mask the per-target losses before their mean, and divide by the number of unmasked targets",
            positions=wrong,
        )


def recite_everything(subject: Subject, learned: Learned) -> None:
    """Greedy from every proper beginning, and ten times at a low temperature from the empty one."""
    sentence = learned.task.sentence
    for length in range(len(sentence)):
        expect_recital(subject, learned, sentence[:length])
    for repeat, said in enumerate(recitals(subject, learned, "", REPEATS, TEMPERATURE)):
        learned.samples.append((f"temperature {TEMPERATURE}", "", said))
        judge_recital(sentence, "", said, f"sample {repeat + 1} of {REPEATS} at temperature {TEMPERATURE}")


def expect_recital(subject: Subject, learned: Learned, prompt: str) -> None:
    said = recite(subject, learned, prompt)
    learned.samples.append(("greedy", prompt, said))
    judge_recital(learned.task.sentence, prompt, said, "greedy decoding")


def judge_recital(sentence: str, prompt: str, said: str, how: str) -> None:
    rest = sentence[len(prompt) :]
    if said == rest:
        return
    at = next((i for i, (a, b) in enumerate(zip(said, rest, strict=False)) if a != b), min(len(said), len(rest)))
    fail(
        f"after {prompt!r}, {how} says {said!r} and not {rest!r}: the first wrong character is number {at + 1}, "
        f"though the loss is at most {LEARNED:g}",
        likely=("no-causal-mask", "causal-sees-one-future", "generate-first-position-logits"),
        advice="a loss this low with wrong text means that training saw what decoding cannot: look at the causal mask",
        prompt=prompt,
        said=said,
        expected=rest,
    )


def recite(subject: Subject, learned: Learned, prompt: str) -> str:
    return recitals(subject, learned, prompt, 1, 0.0)[0]


def recitals(subject: Subject, learned: Learned, prompt: str, copies: int, temperature: float) -> list[str]:
    """What the model says after the begin token and the prompt, until the sentence's length."""
    tokenizer = learned.task.tokenizer
    tokens = [tokenizer.begin, *tokenizer.encode(prompt)]
    start = torch.tensor([tokens] * copies, device=subject.device)
    rest = len(learned.task.sentence) - len(prompt)
    if learned.speak is None:
        learned.speak = speaker(subject, learned)
    return ["".join(readable(tokenizer, i) for i in row) for row in learned.speak(start, rest, temperature)]


def speaker(subject: Subject, learned: Learned) -> Speak:
    """The subject's own generate where it runs and can be told to be greedy, else ours over its logits."""
    model = learned.trainer.model.eval()
    ours = functools.partial(our_words, subject, model)
    try:
        own = replace(decoder(subject, model, learned.task.tokenizer.vocab_size), block_size=learned.task.block_size)
        own.wants("temperature")
        theirs = functools.partial(own_words, own, model, subject.seed)
        longest = len(learned.task.sentence)
        (said,) = theirs(torch.full((1, 1), learned.task.tokenizer.begin, device=subject.device), longest, 0.0)
    except NotApplicable:
        return ours
    except Exception as error:  # a part that only its own script gives it, or a mistake: for the checks of generation
        advise(f"generate raises {type(error).__name__}: {error}; decoded by a loop of ours over the logits")
        return ours
    if len(said) != longest:  # for the checks of generation as well: what was learned is not to be blamed on it
        advise(f"generate gives {len(said)} of {longest} tokens asked for; decoded by a loop of ours over the logits")
        return ours
    return theirs


def own_words(own: Decoder, model: nn.Module, seed: int, start: Tensor, n: int, temperature: float) -> list[list[int]]:
    """Few own functions take a temperature of 0; at a loss of 1e-5 a tenth of it decides as firmly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return own(model, start, n, temperature=temperature or TEMPERATURE)


def our_words(subject: Subject, model: nn.Module, start: Tensor, n: int, temperature: float) -> list[list[int]]:
    generator = torch.Generator().manual_seed(subject.seed) if temperature else None
    said = generate(
        lambda read: subject.logits(model, read), start, n,
        temperature=temperature, generator=generator, use_cache=False,
    )  # fmt: skip
    return said[:, start.shape[1] :].tolist()


def readable(tokenizer: Any, i: int) -> str:
    """The character of a token; a begin token or an id without a character is shown as such."""
    return tokenizer.decode([i]) or "<begin>" if 0 <= i < tokenizer.vocab_size else f"<{i}>"
