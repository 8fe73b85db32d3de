"""What a model is before its first step: a uniform guess, different layers, a stream that depth does not blow up."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checks.expect import NotApplicable, Where, advise, fail, farthest, needs, note
from checks.probes.randomness import seeded
from checks.where import Call, called_by_checks, line_now, locate, recorded

CONTRACT = ("check_contract.check_logits_have_shape",)
SEEDS = 5
FAILURE, HIGH, LOW = 2.0, 0.5, -0.05  # nats above ln V
SHALLOW, DEEP = 4, 16  # layers
TOO_STEEP = 4.0  # growth of the stream from layer 8 to 16: √2 by independent updates, 2 by equal ones, 256 if doubled


def _fresh(subject: Any, seed: int = 0, **sizes: Any) -> nn.Module:
    """A model as its constructor leaves it, with every global generator seeded: some draw weights with NumPy."""
    with seeded(subject.seed + seed):
        return subject.build(seed=subject.seed + seed, **sizes)


@needs(*CONTRACT)
def check_loss_starts_near_uniform(subject: Any) -> None:
    """A model that has learned nothing gives every next token about the same probability: a loss near ln V."""
    if not subject.builds_afresh or not _drawn(subject):
        raise NotApplicable("no weight depends on the seed: they may be trained")
    V, losses = subject.sizes.vocab_size, []
    for seed in range(SEEDS):
        model = _fresh(subject, seed)
        tokens = subject.tokens(4, subject.sizes.block_size, seed=subject.seed + seed)
        targets = subject.tokens(4, subject.sizes.block_size, seed=subject.seed + seed + SEEDS)
        with torch.no_grad():
            logits = subject.logits(model, tokens).double()
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())))
    loss, uniform = median(losses), math.log(V)
    note(loss=loss, uniform=uniform)
    if not loss - uniform <= FAILURE:
        fail(
            f"at initialization the loss on random tokens is {loss:.3g} (median of {SEEDS} seeds), where a uniform "
            f"guess among {V} symbols has ln {V} = {uniform:.3g}: the model is sure of itself before it has learned "
            "anything",
            likely=("init-std-one", "logits-multiplied-by-width"),
            advice="draw embeddings and head with a standard deviation of about 0.02 (nn.Embedding's own is 1; with a "
            "tied head that is also the head's), and norm the last hidden state",
            losses=losses,
            widest=_widest(model),
        )
    if loss - uniform > HIGH:
        advise(f"the loss at initialization is {loss:.3g}, {loss - uniform:.2g} above ln {V}: the first steps unlearn")
    if loss - uniform < LOW:
        advise(f"the loss at initialization is {loss:.3g}, below ln {V}: are these weights trained, or logits scaled?")


def _widest(model: nn.Module) -> dict[str, float]:
    """The three matrices of the largest standard deviation."""
    spreads = {name: float(value.detach().std()) for name, value in model.named_parameters() if value.dim() > 1}
    return dict(sorted(spreads.items(), key=lambda item: -item[1])[:3])


def _drawn(subject: Any) -> set[str]:
    """The parameters whose values are random: another seed gives others. Of an instance, those that look random."""
    one = _state(_fresh(subject))
    if not subject.builds_afresh:
        return {name for name, value in one.items() if value.dim() > 1 and 2 * len(value.unique()) > value.numel()}
    other = _state(_fresh(subject, seed=1))
    return {name for name, value in one.items() if name in other and _apart(value, other[name])}


@needs(*CONTRACT)
def check_layers_start_different(subject: Any) -> None:
    """No two layers, heads or experts start from the same random weights."""
    model, drawn = _fresh(subject), _drawn(subject)
    # biases that start alike do no harm: the matrices beside them tell the layers apart
    random = {name: value for name, value in model.named_parameters() if name in drawn and value.dim() > 1}
    families: dict[str, list[str]] = defaultdict(list)
    for name in random:
        families[_without_numbers(name)].append(name)
    families = {family: names for family, names in families.items() if len(names) > 1}
    if not families:
        raise NotApplicable("no layers of the same kind with random weights of their own")
    for names in families.values():
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                if not _apart(random[first], random[second]):
                    _blame_copy(model, first, second)


def _without_numbers(name: str) -> str:
    """What `blocks.0.norm` and `blocks.1.norm` share."""
    return re.sub(r"\d+", "#", name)


def _apart(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)


def _blame_copy(model: nn.Module, first: str, second: str) -> None:
    owner = second.rpartition(".")[0]
    fail(
        f"{second} starts with exactly the weights of {first}: the two begin as one, and where they see the same input "
        "they stay one",
        where=locate(model, owner or type(model).__name__),
        likely=("layers-identical-at-init", "every-layer-seeded-alike"),
        advice="build every layer by its own constructor call, in a loop, instead of copying one with copy.deepcopy",
        parameters=[first, second],
    )


@needs(*CONTRACT)
def check_seed_decides_the_weights(subject: Any) -> None:
    """The same seed gives the same weights, another seed others."""
    if not subject.builds_afresh:
        raise NotApplicable("an instance was handed in: it is not built again")
    one, again, other = (_state(_fresh(subject, seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        if _apart(value, again[name]):
            fail(
                f"two models built from the same seed differ in {name}, by up to {farthest(value, again[name]):.3g}: "
                "no run can be repeated",
                likely=("weights-from-their-own-generator",),
                advice="draw weights from PyTorch's global generator, or from a generator seeded from it",
                parameter=name,
            )
    varied = [name for name, value in one.items() if value.is_floating_point() and value.unique().numel() > 2]
    fixed = [name for name in varied if not _apart(one[name], other[name])]
    seeding = _seeding_constructor(subject) if fixed else None
    if seeding:
        fail(
            f"two models built from different seeds have the same {fixed[0]}: the constructor seeds the global "
            "generator, for the model and for all that is drawn after it",
            where=seeding,
            likely=("constructor-seeds", "every-layer-seeded-alike"),
            advice="remove manual_seed from the model: the program that trains it chooses the seed",
            fixed=fixed,
        )
    if len(fixed) == len(varied):
        raise NotApplicable("no weight depends on the seed: they are constants, loaded, or an instance's")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _seeding_constructor(subject: Any) -> Where | None:
    """The line of the subject that calls torch.manual_seed while a model is built."""
    lines: list[Where | None] = []
    seed_generator = torch.manual_seed

    def spy(seed: int) -> torch.Generator:
        if not called_by_checks():
            lines.append(line_now())
        return seed_generator(seed)

    with patch.object(torch, "manual_seed", spy), patch.object(torch.random, "manual_seed", spy):
        _fresh(subject)
    return lines[0] if lines else None


@needs(*CONTRACT)
def check_depth_does_not_blow_up(subject: Any) -> None:
    """At initialization the residual stream and the logits of a deep model are about as large as of a shallow one."""
    if not subject.can_vary("n_layer"):
        raise NotApplicable("the number of layers cannot be varied")
    shallow, deep = (_signal(subject, depth) for depth in (SHALLOW, DEEP))
    note(stream=deep.stream, logits={SHALLOW: shallow.logits, DEEP: deep.logits})
    half = len(deep.stream) // 2
    steps = [after / before for before, after in pairwise(deep.stream[half - 1 :]) if before > 0]
    growth = median(steps) ** half if steps else 1.0  # one layer that is drawn larger is not depth
    if not growth <= TOO_STEEP:
        fail(
            f"at initialization the residual stream grows {growth:.3g} times from layer {half} to layer {2 * half} "
            f"(root mean square {deep.stream[half - 1]:.3g} to {deep.stream[-1]:.3g}), exponentially in depth; layers "
            "that add normed updates give about √2",
            where=deep.place,
            likely=("residual-doubled",),
            advice="each sublayer should add one update of bounded size to x: look for x added twice, a missing norm, "
            "or weights drawn too large",
        )
    if not (deep.logits <= 2 * TOO_STEEP * shallow.logits or shallow.logits == 0):
        fail(
            f"at initialization the logits have a standard deviation of {deep.logits:.3g} with {DEEP} layers and "
            f"{shallow.logits:.3g} with {SHALLOW}",
            likely=("residual-doubled", "logits-multiplied-by-width"),
            advice="norm the residual stream before the head",
        )


@dataclass
class _Signal:
    stream: list[float]  # root mean square after each layer
    place: Where | None
    logits: float


def _signal(subject: Any, depth: int) -> _Signal:
    tokens = subject.tokens(2, subject.sizes.block_size, seed=subject.seed)
    model = _fresh(subject, n_layer=depth)
    with torch.no_grad(), recorded(model) as calls:
        logits = subject.logits(model, tokens)
    families: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.outputs and call.outputs[0].shape[:-1] in (tokens.shape, tokens.T.shape):
            families[_without_numbers(call.module)].append(call)
    layers = min((name for name, found in families.items() if len(found) == depth), key=len, default="")
    stream = [float(call.outputs[0].double().pow(2).mean().sqrt()) for call in families.get(layers, [])]
    place = locate(model, families[layers][-1].module) if stream else None
    return _Signal(stream, place, float(logits.double().std()))
