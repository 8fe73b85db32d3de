"""Learning by heart what cannot be guessed: random strings, and two strings that only their beginnings tell apart.

Beside the homework's sentence (check_sanity.py): these are drawn from the run's seed, so no luck of letters helps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..transformer.data import Batch, SentenceTask, pad_batch
from ..transformer.generation import generate
from ..transformer.trainer import Trainer
from .expect import CAUSAL, REACHES, READ_ALONE, READABLE, NotApplicable, advise, fail, needs, note
from .probes.influence import needs_one_token
from .subject import Subject
from .training.runs import refuse_chance
from .training.sentence import LEARNED, RECIPES, objective

CONTRACT = (
    *READABLE,
    "check_loss.check_loss_takes_what_the_model_gives",
)
BEGIN = 0
PART = 4  # tokens of a beginning, of the middle and of an end
SMALL = dict(n_layer=1, n_head=4, n_embd=64, dropout=0.0)
PATIENCE = 200  # steps after which a loss that lies at the floor of a short context is there to stay

Strings = list[list[int]]


@dataclass(frozen=True)
class Task:
    """Strings of ids to learn by heart, each behind a begin token; the first `skip` targets carry no loss."""

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
    """A random string of distinct tokens is learned by heart and said again from its beginning."""
    tokens = draw(subject, 3 * PART)
    recite(subject, Task([tokens]))


@needs(*CONTRACT, CAUSAL, REACHES, "check_memorization.check_memorizes_a_random_string")
def check_memorizes_two_strings_with_the_same_middle(subject: Subject) -> None:
    """Two strings that share their middle are both said to their ends: what follows it depends on what came before."""
    part = PART if room(subject, "vocab_size", 5 * PART + 1) and room(subject, "block_size", 3 * PART) else PART - 1
    tokens = draw(subject, 5 * part)
    first, end, middle, second, other = (tokens[i * part : (i + 1) * part] for i in range(5))
    strings = [first + middle + end, second + middle + other]
    note(context_needed=context_needed(strings), middle=part)
    judge_the_sentence(subject)
    recite(subject, Task(strings, skip=1))


def draw(subject: Subject, n: int) -> list[int]:
    """Distinct ids other than the begin token's."""
    V = max(n + 1, subject.sizes.vocab_size) if subject.can_vary("vocab_size") else subject.sizes.vocab_size
    if n + 1 > V:
        raise NotApplicable(f"a vocabulary of {V} has no {n} distinct tokens beside the begin token", vocab_size=V)
    order = torch.randperm(min(V, 1000) - 1, generator=torch.Generator().manual_seed(subject.seed + 7))
    return (order[:n] + 1).tolist()


def room(subject: Subject, name: str, size: int) -> bool:
    return subject.can_vary(name) or getattr(subject.sizes, name) >= size


def context_needed(strings: Strings) -> int | None:
    """The least k for which the latest k tokens, the begin token included, always tell the next; None if none does.

    The first token of a string is its prompt, and nothing has to tell it.
    """
    longest = max(map(len, strings))
    return next((k for k in range(1, longest + 1) if all(len(n) == 1 for n in followers(strings, k).values())), None)


def followers(strings: Strings, k: int) -> dict[tuple[int, ...], Counter[int]]:
    """How often each token follows each sight of the latest k tokens."""
    found: dict[tuple[int, ...], Counter[int]] = {}
    for string in strings:
        text = [BEGIN, *string]
        for t in range(1 if len(strings) == 1 else 2, len(text)):
            found.setdefault(tuple(text[max(0, t - k) : t]), Counter())[text[t]] += 1
    return found


def floor(strings: Strings, k: int) -> float:
    """The least mean loss, in nats a target, of whoever sees only the latest k tokens."""
    counts = followers(strings, k).values()
    total = sum(n * math.log(follows.total() / n) for follows in counts for n in follows.values())
    return total / sum(follows.total() for follows in counts)


def judge_the_sentence(subject: Subject) -> None:
    """Says so where the subject's tokenizer cuts the homework's sentence into tokens that each tell the next."""
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
            f"your tokenizer cuts {sentence!r} into {len(ids)} tokens of which each tells the next: a bigram model "
            "learns it by heart, so that its sanity check says nothing about attention; this one does"
        )


def recite(subject: Subject, task: Task) -> None:
    """Trains until the loss is at most 1e-5, then has every string said from its prompt."""
    model = train(subject, task).eval()
    for string in task.strings:
        start = torch.tensor([[BEGIN, *string[: task.skip]]], device=subject.device)
        n = len(string) - task.skip
        said = generate(lambda read: subject.logits(model, read), start, n, use_cache=False)[
            0, start.shape[1] :
        ].tolist()
        if said != string[task.skip :]:
            judge_recital(task, string, said)


def judge_recital(task: Task, string: list[int], said: list[int]) -> None:
    right = string[task.skip :]
    at = next(i for i, (a, b) in enumerate(zip(said, right, strict=True)) if a != b)
    other = [s for s in task.strings if s is not string and s[task.skip + at] == said[at]]
    fail(
        f"the loss is at most {LEARNED:g}, and yet after {string[: task.skip + at]} the model says {said[at]}, not "
        f"{right[at]}{': it goes on as the other string does' if other else ''}",
        likely=("no-causal-mask",),
        advice="a loss this low with wrong text means that training saw what decoding cannot: look at the causal mask",
        position=task.skip + at,
        said=said,
        right=right,
    )


def train(subject: Subject, task: Task) -> nn.Module:
    """By the quick recipe, and where that does not learn, by the published one."""
    longest = max(map(len, task.strings))
    wanted = {"vocab_size": max(map(max, task.strings)) + 1, "block_size": longest, **SMALL}
    sizes = {name: value for name, value in wanted.items() if subject.can_vary(name)}
    if not room(subject, "block_size", longest):
        raise NotApplicable(f"{longest} tokens do not fit the model's block size of {subject.sizes.block_size}")
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
        refuse_short_sight(task, loss, tried)
    refuse_chance(subject, trainer.model.train())
    fail(
        f"{len(task.strings)} random string{'s' * (len(task.strings) > 1)} of {longest} tokens cannot be learned by "
        f"heart: {'; '.join(tried)}; wanted {LEARNED:g}",
        advice="look at the gradient checks: what does not learn has usually lost a gradient or its inputs",
        tried=tried,
    )


def run(trainer: Trainer, task: Task) -> float:
    """Steps until it is learned, the recipe's steps are done, or the loss stays where a short context must leave it."""
    loss = math.inf
    while trainer.steps_done < trainer.config.steps and not loss <= LEARNED:
        loss = float(trainer.step())
        if not math.isfinite(loss):
            fail(
                f"the loss is {loss} at step {trainer.steps_done}",
                likely=("vocabulary-masked-too-far",),
                advice="a target whose logit is -∞ has an infinite loss; else look for a log of 0 or a division by it",
                step=trainer.steps_done,
            )
        waited = trainer.steps_done % PATIENCE == 0
        if waited or loss <= LEARNED:  # of a batch, which may hold one of the strings alone
            loss = trainer.evaluate(task.strings)
        if waited and sight(task, loss):
            return loss
    return loss


def sight(task: Task, loss: float) -> int | None:
    """The context whose floor this loss is, to 1 %; None if of none."""
    needed = context_needed(task.strings) or 1
    return next((k for k in range(1, needed) if abs(loss / floor(task.strings, k) - 1) < 0.01), None)


def refuse_short_sight(task: Task, loss: float, tried: list[str]) -> None:
    k = sight(task, loss)
    if k is not None:
        needed = context_needed(task.strings)
        fail(
            f"what follows the {needed - 1 if needed else 0} tokens that both strings share is not learned: the loss "
            f"stays at {loss:.4f}, the least that is possible without looking further back than the shared tokens "
            f"({'; '.join(tried)})",
            likely=("attention-sees-itself-only", "attention-forgets-the-past"),
            advice="the model does not use what came earlier: look at its past influence, mask and attention weights",
            loss=loss,
            floor=floor(task.strings, k),
            context_needed=needed,
        )
