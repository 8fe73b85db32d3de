"""The two sanity checks: a one-layer model learns a sentence by heart, then only the part of it that carries loss.

They train a fresh model of the subject; what they leave behind (curves, samples, weights) is kept for the report.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..transformer.data import Batch, SentenceTask
from ..transformer.generation import generate
from ..transformer.loss import next_token_loss
from ..transformer.trainer import PUBLISHED, TrainConfig, Trainer
from .expect import NotApplicable, advise, fail, keep, needs, note
from .generation.met_generate import Decoder, decoder
from .loss.given import cross_entropy_line, gives
from .loss.met_loss import met_loss
from .probes.influence import needs_one_token
from .training.runs import refuse_chance

CONTRACT = ("check_contract.check_logits_have_shape", "check_contract.check_logits_are_finite")
# Without these a text is learned whole and in a batch, and said from its beginning on and by itself: another text.
READ_ALONE = (
    "check_causality.check_future_cannot_change_past",
    "check_causality.check_prefix_gives_the_same_logits",
    "check_masking.check_rows_do_not_touch",
)
HOMEWORK = dict(n_layer=1, n_head=4, n_embd=128, dropout=0.0)
SKIP = 3  # in the second check the first three targets, "I", " " and "l", carry no loss
LEARNED = 1e-5  # nats a target
OVERSHOOTING = 20  # steps with a loss this low, after none of which it is, before training is given up
NOT_LEARNED = 1.0  # nats a target that nothing taught
TEMPERATURE, REPEATS = 0.1, 10

QUICK = TrainConfig()
RECIPES = {"quick": QUICK, "published": PUBLISHED}


def sanity(check: Callable) -> Callable:
    check.sanity = True  # type: ignore[attr-defined]
    return check


Speak = Callable[[Tensor, int, float], list[list[int]]]  # rows to continue, by how many tokens, at which temperature


@dataclass
class Learned:
    """A training of the sentence and what came of it."""

    task: SentenceTask
    sizes: dict[str, int]
    recipe: str
    trainer: Trainer
    curve: list[dict[str, float]] = field(default_factory=list)  # a record a step
    before: dict[str, float] = field(default_factory=dict)  # split → loss over the targets that carry loss
    after: dict[str, float] = field(default_factory=dict)
    masked: float = math.nan  # mean cross entropy of the targets that carry none, after training
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # how, prompt, continuation
    tried: list[str] = field(default_factory=list)  # what each recipe came to
    speak: Speak | None = None  # how it is made to generate

    @property
    def loss(self) -> float:
        return self.after["train"]

    def crossed(self, threshold: float) -> int | None:
        """The first step whose training loss is at most the threshold."""
        return next((int(r["step"]) for r in self.curve if r["loss"] <= threshold), None)


@sanity
@needs(*CONTRACT, *READ_ALONE)
def check_memorizes_the_sentence(subject: Any) -> None:
    """A one-layer model learns the sentence by heart: loss at most 1e-5, and the exact rest after every beginning."""
    learned = learn(subject, SentenceTask())
    expect_learned(subject, learned)
    recite_everything(subject, learned)


@sanity
@needs(*CONTRACT, *READ_ALONE)
def check_learns_only_unmasked_targets(subject: Any) -> None:
    """With the first three targets masked, the others are learned to 1e-5 and the masked ones not at all."""
    learned = learn(subject, SentenceTask(skip=SKIP))
    expect_learned(subject, learned)
    expect_masked_targets_untaught(subject, learned)
    sentence = learned.task.sentence
    expect_recital(subject, learned, sentence[:SKIP])
    for observed in ("", sentence[:1]):
        learned.samples.append(("observed, not judged", observed, recite(subject, learned, observed)))


# training


def learn(subject: Any, task: SentenceTask) -> Learned:
    """Trains by the quick recipe, and where that fails by the published one; keeps the better of the two."""
    sizes = sentence_sizes(subject, task)
    tried: list[str] = []
    best: Learned | None = None
    for recipe in RECIPES:
        learned = train(subject, task, sizes, recipe)
        tried.append(f"{recipe} recipe: loss {learned.loss:.2g} after {learned.trainer.steps_done} steps")
        if best is None or learned.loss < best.loss:
            best = learned
        if best.loss <= LEARNED or gives(subject) == "probabilities":  # which no recipe makes learn
            break
    assert best is not None
    best.tried = tried
    note(recipe=best.recipe, steps=best.trainer.steps_done, loss=best.loss, masked_loss=best.masked, sizes=sizes)
    keep(learned=best)
    return best


def sentence_sizes(subject: Any, task: SentenceTask) -> dict[str, Any]:
    """The homework's sizes where the subject takes them, else its own, if the sentence fits."""
    wanted = dict(vocab_size=task.tokenizer.vocab_size, block_size=task.block_size, **HOMEWORK)
    sizes = {name: value for name, value in wanted.items() if subject.can_vary(name)}
    for name, most in (("vocab_size", subject.sizes.vocab_size), ("block_size", subject.longest)):
        if name not in sizes and most is not None and most < wanted[name]:
            raise NotApplicable(
                f"the sentence needs {name} {wanted[name]}, and the model's is fixed at {most}: let its constructor, "
                "or a function build_model(vocab_size, block_size), take it",
                **{name: most},
            )
    return sizes


def train(subject: Any, task: SentenceTask, sizes: dict[str, Any], recipe: str) -> Learned:
    model = subject.build(seed=subject.seed, **sizes)
    needs_one_token(subject, model)
    config = replace(RECIPES[recipe], seed=subject.seed, device=str(subject.device))
    trainer = Trainer(model, task, config, objective=objective(subject))
    learned = Learned(task, sizes, recipe, trainer)
    learned.before = losses(subject, learned)
    every = 1 if recipe == "quick" else 25
    low = 0  # steps whose loss was low enough; it is the loss before them, and some overshoot
    while trainer.steps_done < config.steps and low < OVERSHOOTING:
        loss = float(trainer.step())
        if not math.isfinite(loss):
            fail(
                f"the loss is {loss} at step {trainer.steps_done} of the {recipe} recipe",
                advice="look for a division by zero, a log of 0, or a softmax over nothing",
                step=trainer.steps_done,
            )
        record = {"step": trainer.steps_done, "loss": loss}
        if trainer.steps_done % every == 1 or every == 1:
            record |= validation(subject, learned)
        learned.curve.append(record)
        if loss <= LEARNED:
            low += 1
            if losses(subject, learned)["train"] <= LEARNED:
                break
    learned.after = losses(subject, learned)
    learned.masked = validation(subject, learned)["masked_loss"]
    return learned


def objective(subject: Any) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """The subject's own loss where it brings one, else ours; as the sum that the trainer wants."""
    loss = loss_of(subject)

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        count = batch.loss_mask.sum()
        mask = None if bool(batch.loss_mask.all()) else batch.loss_mask
        return loss(logits_of(subject, model, batch.tokens), batch.targets, mask) * count, count

    return objective


def logits_of(subject: Any, model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, T, V]; of a model that means to give probabilities (nothing in its file takes them for logits) their log."""
    given: Tensor = subject.logits(model, tokens)
    if subject.returns == "probabilities" and cross_entropy_line(subject) is None:
        return given.clamp_min(torch.finfo(given.dtype).tiny).log()
    return given


def loss_of(subject: Any) -> Callable[..., Tensor]:
    """loss(logits, targets, mask): the subject's own where it brings one that can leave targets out, else ours."""
    if not subject.brings("loss"):
        return next_token_loss
    try:
        own = met_loss(subject)
    except NotApplicable as reason:
        advise(f"trained with a loss of ours, since of its own {reason.reason}")
        return next_token_loss
    return own if own.masks else _ours_where_masked(own)


def _ours_where_masked(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return own(logits, targets) if mask is None else next_token_loss(logits, targets, mask)

    return loss


def losses(subject: Any, learned: Learned) -> dict[str, float]:
    """Mean cross entropy of each split over the targets that carry loss, by our own loss."""
    return {
        split: split_losses(subject, learned, getattr(learned.task, split))["unmasked"]
        for split in ("train", "validation", "test")
    }


def validation(subject: Any, learned: Learned) -> dict[str, float]:
    found = split_losses(subject, learned, learned.task.validation)
    return {"validation_loss": found["unmasked"], "all_targets_loss": found["all"], "masked_loss": found["masked"]}


def split_losses(subject: Any, learned: Learned, texts: list[str]) -> dict[str, float]:
    """Mean cross entropy over the unmasked, the masked and all targets; identical texts are computed once."""
    batch = learned.task.batch(list(dict.fromkeys(texts))).to(subject.device)
    model = learned.trainer.model
    with learned.trainer.eval_mode(), torch.no_grad():
        logits = logits_of(subject, model, batch.tokens).detach()
    kinds = {"unmasked": batch.loss_mask, "masked": ~batch.loss_mask & batch.mask, "all": batch.mask}
    return {
        name: float(next_token_loss(logits, batch.targets, mask)) if mask.any() else math.nan
        for name, mask in kinds.items()
    }


# judging


def expect_learned(subject: Any, learned: Learned) -> None:
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


def expect_masked_targets_untaught(subject: Any, learned: Learned) -> None:
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


def recite_everything(subject: Any, learned: Learned) -> None:
    """Greedy from every proper beginning, and ten times at a low temperature from the empty one."""
    sentence = learned.task.sentence
    for length in range(len(sentence)):
        expect_recital(subject, learned, sentence[:length])
    for repeat, said in enumerate(recitals(subject, learned, "", REPEATS, TEMPERATURE)):
        learned.samples.append((f"temperature {TEMPERATURE}", "", said))
        judge_recital(sentence, "", said, f"sample {repeat + 1} of {REPEATS} at temperature {TEMPERATURE}")


def expect_recital(subject: Any, learned: Learned, prompt: str) -> None:
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


def recite(subject: Any, learned: Learned, prompt: str) -> str:
    return recitals(subject, learned, prompt, 1, 0.0)[0]


def recitals(subject: Any, learned: Learned, prompt: str, copies: int, temperature: float) -> list[str]:
    """What the model says after the begin token and the prompt, until the sentence's length."""
    tokenizer = learned.task.tokenizer
    tokens = [tokenizer.begin, *tokenizer.encode(prompt)]
    start = torch.tensor([tokens] * copies, device=subject.device)
    rest = len(learned.task.sentence) - len(prompt)
    if learned.speak is None:
        learned.speak = speaker(subject, learned)
    return ["".join(readable(tokenizer, i) for i in row) for row in learned.speak(start, rest, temperature)]


def speaker(subject: Any, learned: Learned) -> Speak:
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


def our_words(subject: Any, model: nn.Module, start: Tensor, n: int, temperature: float) -> list[list[int]]:
    generator = torch.Generator().manual_seed(subject.seed) if temperature else None
    said = generate(
        lambda read: subject.logits(model, read), start, n,
        temperature=temperature, generator=generator, use_cache=False,
    )  # fmt: skip
    return said[:, start.shape[1] :].tolist()


def readable(tokenizer: Any, i: int) -> str:
    """The character of a token; a begin token or an id without a character is shown as such."""
    return tokenizer.decode([i]) or "<begin>" if 0 <= i < tokenizer.vocab_size else f"<{i}>"
