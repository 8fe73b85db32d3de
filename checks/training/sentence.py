"""The homework's sentence learned by heart: the sizes, the recipes, the training, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.data import Batch, SentenceTask
from ...transformer.loss import next_token_loss
from ...transformer.trainer import PUBLISHED, TrainConfig, Trainer
from ..expect import NotApplicable, advise, fail, keep, note
from ..loss.given import cross_entropy_line, gives
from ..loss.met_loss import met_loss
from ..probes.influence import needs_one_token
from ..subject import Subject

HOMEWORK = dict(n_layer=1, n_head=4, n_embd=128, dropout=0.0)
LEARNED = 1e-5  # nats a target
OVERSHOOTING = 20  # steps with a loss this low, after none of which it is, before training is given up
QUICK = TrainConfig()
RECIPES = {"quick": QUICK, "published": PUBLISHED}

# Rows to continue, by how many tokens, at which temperature.
Speak = Callable[[Tensor, int, float], list[list[int]]]


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


def learn(subject: Subject, task: SentenceTask) -> Learned:
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


def sentence_sizes(subject: Subject, task: SentenceTask) -> dict[str, Any]:
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


def train(subject: Subject, task: SentenceTask, sizes: dict[str, Any], recipe: str) -> Learned:
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


def objective(subject: Subject) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    """The subject's own loss where it brings one, else ours; as the sum that the trainer wants."""
    loss = loss_of(subject)

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        count = batch.loss_mask.sum()
        mask = None if bool(batch.loss_mask.all()) else batch.loss_mask
        return loss(logits_of(subject, model, batch.tokens), batch.targets, mask) * count, count

    return objective


def logits_of(subject: Subject, model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, T, V]; of a model that means to give probabilities (nothing in its file takes them for logits) their log."""
    given: Tensor = subject.logits(model, tokens)
    if subject.returns == "probabilities" and cross_entropy_line(subject) is None:
        return given.clamp_min(torch.finfo(given.dtype).tiny).log()
    return given


def loss_of(subject: Subject) -> Callable[..., Tensor]:
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


def losses(subject: Subject, learned: Learned) -> dict[str, float]:
    """Mean cross entropy of each split over the targets that carry loss, by our own loss."""
    return {
        split: split_losses(subject, learned, getattr(learned.task, split))["unmasked"]
        for split in ("train", "validation", "test")
    }


def validation(subject: Subject, learned: Learned) -> dict[str, float]:
    found = split_losses(subject, learned, learned.task.validation)
    return {"validation_loss": found["unmasked"], "all_targets_loss": found["all"], "masked_loss": found["masked"]}


def split_losses(subject: Subject, learned: Learned, texts: list[str]) -> dict[str, float]:
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
