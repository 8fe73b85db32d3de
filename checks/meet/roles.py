"""What a parameter of a model, a loss or a training step stands for: by its name; targets also by what they do.

Targets change the loss that a forward returns and leave its logits as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import vocabulary
from .arguments import Parameter
from .call_forms import parameters_of
from .vocabulary import MISSING, squash

# One name may stand for different things in different functions: "x" is logits to a loss and tokens to a step.
NAMES: dict[str, frozenset[str]] = {
    "model": vocabulary.words("model net network m gpt lm transformer"),
    "optimizer": vocabulary.words("optimizer optimiser optim opt"),
    "batch": vocabulary.words("batch data sample minibatch"),
    "logits": vocabulary.words(
        "logits logit input inputs output outputs out pred preds prediction predictions x ypred yhat logprobs logprob "
        "scores probs source inputbatch idx data"
    ),
    "tokens": vocabulary.words(
        "x xb inputs input inputids tokens idx ids src inputbatch xbatch xs context tokenids inputtokens"
    ),
    "targets": frozenset(vocabulary.TARGETS | {"tgt", "trg"}),
    "mask": vocabulary.words("mask attentionmask lossmask attnmask"),
    "loss": vocabulary.words("lossfn criterion lossfunction lossfunc crit loss"),
    "scheduler": vocabulary.words("scheduler lrscheduler sched"),
    "scaler": vocabulary.words("scaler gradscaler"),
    "device": vocabulary.words("device"),
    "clip": vocabulary.words("clip maxnorm gradclip clipnorm maxgradnorm gradclipnorm clipvalue clipgrad"),
    "count": vocabulary.words("step it iteration i epoch globalstep iter stepnum iternum"),
    "vocabulary": vocabulary.words("vocabsize nvocab vocab numclasses nclasses"),
}


def role_among(name: str, roles: Iterable[str]) -> str:
    """The first of these roles that goes by this name; "" if none does."""
    plain = squash(name)
    return next((role for role in roles if plain in NAMES[role]), "")


# -- the targets of a forward


def targets_of(model: nn.Module, tokens: Tensor, vocab_size: int) -> Parameter | None:
    """The parameter of forward that takes targets [B, T] for a loss: by its name, else by what it does."""
    _tokens, *parameters = parameters_of(model)
    named = [p for p in parameters if squash(p.name) in NAMES["targets"] and p.default in (None, MISSING)]
    named.sort(key=lambda p: p.default is MISSING)  # a required one may be the input of a decoder
    if named:
        return named[0]
    unknown = [p for p in parameters if p.default in (None, MISSING) and not _known(p)]
    return next((p for p in unknown if _are_targets(model, p, tokens, vocab_size)), None)


def named_otherwise(parameter: Parameter | None) -> bool:
    """Whether it was recognised by what it does alone."""
    return parameter is not None and squash(parameter.name) not in NAMES["targets"]


def _known(parameter: Parameter) -> bool:
    plain = squash(parameter.name)
    others = vocabulary.POSITIONS | vocabulary.STARTS | vocabulary.CACHES | vocabulary.SOURCES
    return (
        "mask" in plain or plain in others or parameter.kind in (bool, int, float, str, "bool", "int", "float", "str")
    )


def _are_targets(model: nn.Module, parameter: Parameter, tokens: Tensor, vocab_size: int) -> bool:
    """Whether other ids there give another loss and the same logits; without ids there is no such loss."""
    name, one = parameter.name, tokens.roll(-1, dims=1)
    try:
        with torch.no_grad():
            first, second = (list(_floats(model(tokens, **{name: ids}))) for ids in (one, (one + 1) % vocab_size))
            alone = [] if parameter.default is MISSING else list(_floats(model(tokens)))
    except Exception:
        return False
    if [x.shape for x in first] != [x.shape for x in second]:
        return False
    moved = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    losses = [moves for x, moves in zip(first, moved, strict=True) if x.numel() == 1]
    rest = [moves for x, moves in zip(first, moved, strict=True) if x.numel() != 1]
    return any(losses) and not any(rest) and sum(x.numel() == 1 for x in alone) < len(losses)


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a forward returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floats(list(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floats(item)
    elif hasattr(output, "loss") or hasattr(output, "logits"):
        yield from _floats(vars(output))
