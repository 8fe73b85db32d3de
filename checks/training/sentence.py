"""Training on the sentence of the sanity checks: model sizes, training recipes, the training loop and its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.data import Batch, SentenceTask
from ...transformer.loss import next_token_loss
from ...transformer.trainer import PUBLISHED, TrainConfig, Trainer
from ..expect import NotApplicable, advise, fail, keep, note
from ..loss.met_loss import met_loss
from ..loss.returned import cross_entropy_line, gives
from ..probes.influence import needs_one_token
from ..probes.preconditions import expect_trainable
from ..subject import Subject

HOMEWORK = dict(n_layer=1, n_head=4, n_embd=128, dropout=0.0)
LEARNED = 1e-5  # nats per target
OVERSHOOTING = 20  # steps that start at a loss this low and end above it, before training is given up
QUICK = TrainConfig()
RECIPES = {"quick": QUICK, "published": PUBLISHED}

# Prompts [B, T], number of new tokens, temperature → the new tokens of each row.
Generate = Callable[[Tensor, int, float], list[list[int]]]


@dataclass
class Learned:
    """A training on the sentence and its result."""

    task: SentenceTask
    sizes: dict[str, int]
    recipe: str
    trainer: Trainer
    curve: list[dict[str, float]] = field(default_factory=list)  # one record per step
    before: dict[str, float] = field(default_factory=dict)  # split → mean loss of the unmasked targets
    after: dict[str, float] = field(default_factory=dict)
    masked: float = math.nan  # mean cross entropy of the masked targets, after training
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # how it was decoded, prompt, completion
    tried: list[str] = field(default_factory=list)  # the result of each recipe
    generate: Generate | None = None

    @property
    def loss(self) -> float:
        return self.after["train"]

    def crossed(self, threshold: float) -> int | None:
        """The first step whose training loss is at most the threshold."""
        return next((int(r["step"]) for r in self.curve if r["loss"] <= threshold), None)


def learn(subject: Subject, task: SentenceTask) -> Learned:
    """Trains with the quick recipe and, if that fails, with the published one; keeps the better result."""
    expect_trainable(subject)
    sizes = sentence_sizes(subject, task)
    tried: list[str] = []
    best: Learned | None = None
    for recipe in RECIPES:
        learned = train(subject, task, sizes, recipe)
        tried.append(f"{recipe} recipe: loss {learned.loss:.2g} after {learned.trainer.steps_done} steps")
        if best is None or learned.loss < best.loss:
            best = learned
        if best.loss <= LEARNED or gives(subject) == "probabilities":  # no recipe trains those
            break
    assert best is not None
    best.tried = tried
    note(recipe=best.recipe, steps=best.trainer.steps_done, loss=best.loss, masked_loss=best.masked, sizes=sizes)
    keep(learned=best)
    return best


def sentence_sizes(subject: Subject, task: SentenceTask) -> dict[str, Any]:
    """The sizes of the sanity checks where the subject accepts them, otherwise its own if the sentence fits."""
    wanted = dict(vocab_size=task.tokenizer.vocab_size, block_size=task.block_size, **HOMEWORK)
    sizes = {name: value for name, value in wanted.items() if subject.can_vary(name)}
    for name, most in (("vocab_size", subject.sizes.vocab_size), ("block_size", subject.longest)):
        if name not in sizes and most is not None and most < wanted[name]:
            raise NotApplicable(
                f"the sentence needs {name} {wanted[name]}, but your model's is fixed at {most}: accept it as an "
                "argument of the constructor, or define a function build_model(vocab_size, block_size)",
                **{name: most},
            )
    return sizes


def train(subject: Subject, task: SentenceTask, sizes: dict[str, Any], recipe: str) -> Learned:
    model = subject.build(seed=subject.seed, **sizes)
    needs_one_token(subject, model)
    config = replace(RECIPES[recipe], seed=subject.seed, device=str(subject.device))
    trainer = Trainer(model, task, config, objective=objective(subject))
    learned = Learned(task, sizes, recipe, trainer)
    learned.before = of_splits(evaluated(subject, learned))
    every = 1 if recipe == "quick" else 25
    low = 0  # steps with a low enough loss; a step reports its loss before the update, which may overshoot
    while trainer.steps_done < config.steps and low < OVERSHOOTING:
        loss = float(trainer.step())
        if not math.isfinite(loss):
            fail(
                f"the training loss is {loss} at step {trainer.steps_done} of the {recipe} recipe",
                advice="Look for a division by zero, the log of 0, or a softmax over a row that is masked completely.",
                step=trainer.steps_done,
            )
        record = {"step": trainer.steps_done, "loss": loss}
        learned.curve.append(record)
        recorded = every == 1 or trainer.steps_done % every == 1
        if not recorded and loss > LEARNED:
            continue
        found = evaluated(subject, learned)
        if recorded:
            record |= of_validation(found)
        if loss <= LEARNED:
            low += 1
            if found["train"]["unmasked"] <= LEARNED:
                break
    found = evaluated(subject, learned)
    learned.after, learned.masked = of_splits(found), found["validation"]["masked"]
    return learned


def objective(subject: Subject) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """The subject's own loss if it has one, otherwise ours; as the sum that the trainer expects."""
    loss = loss_of(subject)

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        count = batch.loss_mask.sum()
        mask = None if bool(batch.loss_mask.all()) else batch.loss_mask
        return loss(logits_of(subject, model, batch.tokens), batch.targets, mask) * count, count

    return objective


def logits_of(subject: Subject, model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V]; for a model that returns probabilities on purpose (no cross_entropy in its file), their log."""
    given: Tensor = subject.logits(model, tokens)
    if subject.returns == "probabilities" and cross_entropy_line(subject) is None:
        return given.clamp_min(torch.finfo(given.dtype).tiny).log()
    return given


def loss_of(subject: Subject) -> Callable[..., Tensor]:
    """loss(logits, targets, mask): the subject's own if it has one, but ours where it cannot mask targets."""
    if not subject.brings("loss"):
        return next_token_loss
    try:
        own = met_loss(subject)
    except NotApplicable as reason:
        advise(f"your loss was not used for this training: {reason.reason}")
        return next_token_loss
    return own if own.masks else ours_where_masked(own)


def ours_where_masked(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        return own(logits, targets) if mask is None else next_token_loss(logits, targets, mask)

    return loss


SPLITS = ("train", "validation", "test")
Evaluation = dict[str, dict[str, float]]  # split → kind of targets (unmasked, masked, all) → their mean cross entropy


def of_splits(found: Evaluation) -> dict[str, float]:
    return {split: found[split]["unmasked"] for split in SPLITS}


def of_validation(found: Evaluation) -> dict[str, float]:
    kinds = {"validation_loss": "unmasked", "all_targets_loss": "all", "masked_loss": "masked"}
    return {name: found["validation"][kind] for name, kind in kinds.items()}


def evaluated(subject: Subject, learned: Learned) -> Evaluation:
    """Every split, always with our loss; those of the same texts are computed once."""
    texts = {split: tuple(dict.fromkeys(getattr(learned.task, split))) for split in SPLITS}
    found = {distinct: mean_losses(subject, learned, distinct) for distinct in dict.fromkeys(texts.values())}
    return {split: found[distinct] for split, distinct in texts.items()}


def mean_losses(subject: Subject, learned: Learned, texts: Sequence[str]) -> dict[str, float]:
    """Mean cross entropy of the unmasked, the masked and all targets; NaN where there is none."""
    batch = learned.task.batch(texts).to(subject.device)
    model = learned.trainer.model
    with learned.trainer.eval_mode(), torch.no_grad():
        logits = logits_of(subject, model, batch.tokens).detach()

    def mean(mask: Tensor) -> float:
        return float(next_token_loss(logits, batch.targets, mask))

    everything = mean(batch.mask)
    if not learned.task.skip:
        return {"unmasked": everything, "masked": math.nan, "all": everything}
    return {"unmasked": mean(batch.loss_mask), "masked": mean(~batch.loss_mask & batch.mask), "all": everything}
