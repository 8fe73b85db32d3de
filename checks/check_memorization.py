"""Memorizing what cannot be guessed: a random string, and two strings that differ only before and after their middle.

Unlike the sentence of check_sanity.py, they are drawn from the run's seed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..transformer.data import Batch, SentenceTask, pad_batch
from ..transformer.generation import generate
from ..transformer.trainer import Trainer
from .expect import CAUSAL, REACHES, READ_ALONE, READABLE, NotApplicable, advise, fail, needs, note
from .probes.influence import needs_one_token
from .probes.preconditions import expect_trainable
from .subject import Subject
from .training.runs import refuse_chance
from .training.sentence import LEARNED, RECIPES, objective

CONTRACT = (
    *READABLE,
    "check_loss.check_loss_takes_what_the_model_gives",
)
BEGIN = 0
PART = 4  # tokens in a beginning, in the middle and in an end
SMALL = dict(n_layer=1, n_head=4, n_embd=64, dropout=0.0)
PATIENCE = 200  # steps after which a loss at the floor of a short context will not fall any more

Strings = list[list[int]]


@dataclass(frozen=True)
class Task:
    """Strings of ids to memorize, each after a begin token; the first `skip` targets are masked."""

    strings: Strings
    skip: int = 0

    @property
    def train(self) -> Strings:
        return self.strings * 10

    @property
    def validation(self) -> Strings:
        return self.strings

    def batch(self, strings: Sequence[Sequence[int]]) -> Batch:
        return pad_batch([[BEGIN, *string] for string in strings], self.skip)


@needs(*CONTRACT, *READ_ALONE)
def check_memorizes_a_random_string(subject: Subject) -> None:
    """The model must memorize a random string of distinct tokens and generate it from the begin token."""
    tokens = draw(subject, 3 * PART)
    expect_memorized(subject, Task([tokens]))


@needs(*CONTRACT, CAUSAL, REACHES, "check_memorization.check_memorizes_a_random_string")
def check_memorizes_two_strings_with_the_same_middle(subject: Subject) -> None:
    """The model must complete both of two strings that share their middle: the right end depends on the beginning."""
    part = PART if room(subject, "vocab_size", 5 * PART + 1) and room(subject, "block_size", 3 * PART) else PART - 1
    tokens = draw(subject, 5 * part)
    first, end, middle, second, other = (tokens[i * part : (i + 1) * part] for i in range(5))
    strings = [first + middle + end, second + middle + other]
    note(context_needed=context_needed(strings), middle=part)
    judge_the_sentence(subject)
    expect_memorized(subject, Task(strings, skip=1))


def draw(subject: Subject, n: int) -> list[int]:
    """n distinct ids, none of them the begin token."""
    V = max(n + 1, subject.sizes.vocab_size) if subject.can_vary("vocab_size") else subject.sizes.vocab_size
    if n + 1 > V:
        raise NotApplicable(
            f"a vocabulary of {V} is too small for {n} distinct tokens besides the begin token", vocab_size=V
        )
    order = torch.randperm(min(V, 1000) - 1, generator=torch.Generator().manual_seed(subject.seed + 7))
    ids: list[int] = (order[:n] + 1).tolist()
    return ids


def room(subject: Subject, name: str, size: int) -> bool:
    return subject.can_vary(name) or int(getattr(subject.sizes, name)) >= size


def context_needed(strings: Strings) -> int | None:
    """The smallest k for which the latest k tokens (begin token included) determine the next one; None if none does.

    With several strings, the first token of each is its prompt and need not be determined.
    """
    longest = max(map(len, strings))
    return next((k for k in range(1, longest + 1) if all(len(n) == 1 for n in followers(strings, k).values())), None)


def followers(strings: Strings, k: int) -> dict[tuple[int, ...], Counter[int]]:
    """By context (the latest k tokens): how often each token follows it."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for string in strings:
        text = [BEGIN, *string]
        for t in range(1 if len(strings) == 1 else 2, len(text)):
            found.setdefault(tuple(text[max(0, t - k) : t]), Counter())[text[t]] += 1
    return found


def floor(strings: Strings, k: int) -> float:
    """The lowest mean loss (nats per target) that is possible from the latest k tokens alone."""
    counts = followers(strings, k).values()
    total = sum(n * math.log(follows.total() / n) for follows in counts for n in follows.values())
    return total / sum(follows.total() for follows in counts)


def judge_the_sentence(subject: Subject) -> None:
    """Advice if the subject's tokenizer splits the sentence of the sanity checks so that each token gives the next."""
    encode = getattr(subject.part("tokenizer"), "encode", None)
    sentence = SentenceTask().sentence
    try:
        ids = [int(i) for i in encode(sentence)] if encode else SentenceTask().tokenizer.encode(sentence)
    except Exception:
        return
    needed = context_needed([ids])
    note(sentence_context_needed=needed, sentence_tokens=len(ids))
    if needed == 1:
        advise(
            f"your tokenizer splits {sentence!r} into {len(ids)} tokens, each of which determines the next: a bigram "
            "model can memorize it, so the sanity checks do not test attention here; this check does"
        )


def expect_memorized(subject: Subject, task: Task) -> None:
    """Trains to a loss of 1e-5, then completes every string greedily from its prompt."""
    model = train(subject, task).eval()
    for string in task.strings:
        start = torch.tensor([[BEGIN, *string[: task.skip]]], device=subject.device)
        n = len(string) - task.skip
        text = generate(lambda read: subject.logits(model, read), start, n, use_cache=False)
        completion = text[0, start.shape[1] :].tolist()
        if completion != string[task.skip :]:
            refuse_completion(task, string, completion)


def refuse_completion(task: Task, string: list[int], got: list[int]) -> None:
    want = string[task.skip :]
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    other = [s for s in task.strings if s is not string and s[task.skip + at] == got[at]]
    fail(
        f"after {string[: task.skip + at]} greedy decoding gives {got[at]}, expected {want[at]}"
        f"{' (it continues with the other string)' if other else ''}, although the loss is at most {LEARNED:g}",
        likely=("no-causal-mask",),
        advice="Look at the causal mask: with a loss this low, wrong text means that training saw later tokens, which "
        "decoding does not have.",
        position=task.skip + at,
        said=got,
        right=want,
    )


def train(subject: Subject, task: Task) -> nn.Module:
    """Trains with the quick recipe and, if that fails, with the published one."""
    expect_trainable(subject)
    longest = max(map(len, task.strings))
    wanted = {"vocab_size": max(map(max, task.strings)) + 1, "block_size": longest, **SMALL}
    sizes: dict[str, Any] = {name: value for name, value in wanted.items() if subject.can_vary(name)}
    if not room(subject, "block_size", longest):
        raise NotApplicable(f"{longest} tokens do not fit in the model's block size of {subject.sizes.block_size}")
    tried = []
    for name, recipe in RECIPES.items():
        model = subject.build(seed=subject.seed, **sizes)
        needs_one_token(subject, model)
        config = replace(recipe, seed=subject.seed, device=str(subject.device))
        trainer = Trainer(model, task, config, objective=objective(subject))
        loss = run(trainer, task)
        if loss <= LEARNED:
            note(steps=trainer.steps_done, recipe=name)
            return trainer.model
        tried.append(f"{name} recipe: loss {loss:.2g} after {trainer.steps_done} steps")
        refuse_short_context(task, loss, tried)
    refuse_chance(subject, trainer.model.train())
    what = "a random string" if len(task.strings) == 1 else f"{len(task.strings)} random strings"
    fail(
        f"the model cannot memorize {what} of {longest} tokens: {'; '.join(tried)}; expected a loss of at most "
        f"{LEARNED:g}",
        advice="Run -k check_gradients: a model that does not learn has usually lost a gradient or its inputs.",
        tried=tried,
    )


def run(trainer: Trainer, task: Task) -> float:
    """Trains until the strings are learned, the recipe ends, or the loss stays at the floor of a short context."""
    loss = math.inf
    while trainer.steps_done < trainer.config.steps and not loss <= LEARNED:
        loss = float(trainer.step())
        if not math.isfinite(loss):
            fail(
                f"the training loss is {loss} at step {trainer.steps_done}",
                likely=("vocabulary-masked-too-far",),
                advice="Look for a target whose logit is -∞ (its loss is infinite), the log of 0, or a division by 0.",
                step=trainer.steps_done,
            )
        waited = trainer.steps_done % PATIENCE == 0
        if waited or loss <= LEARNED:  # that was the loss of one batch, which may hold only one of the strings
            loss = trainer.evaluate(task.strings)
        if waited and context_used(task, loss):
            return loss
    return loss


def context_used(task: Task, loss: float) -> int | None:
    """The context length whose floor this loss equals, to 1 %; None if there is none."""
    needed = context_needed(task.strings) or 1
    return next((k for k in range(1, needed) if abs(loss / floor(task.strings, k) - 1) < 0.01), None)


def refuse_short_context(task: Task, loss: float, tried: list[str]) -> None:
    k = context_used(task, loss)
    if k is not None:
        needed = context_needed(task.strings)
        fail(
            f"the model does not learn what follows the {needed - 1 if needed else 0} tokens that both strings share: "
            f"the loss stays at {loss:.4f}, the lowest that is possible from the shared tokens alone "
            f"({'; '.join(tried)})",
            likely=("attention-sees-itself-only", "attention-forgets-the-past"),
            advice="The model does not use earlier tokens. Run -k check_past_reaches_every_later_position, then print "
            "the mask and the attention weights.",
            loss=loss,
            floor=floor(task.strings, k),
            context_needed=needed,
        )
