"""The model before training: near-uniform predictions, layers that differ, weights of a trainable size and mean."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .expect import READABLE, NotApplicable, Where, advise, fail, farthest, needs, note
from .probes.precision import precise, precision
from .subject import Subject
from .watch.calls import Call, recorded
from .watch.draws import seeded, uninitialized_memory_is_nan
from .watch.location import called_by_checks, line_now, locate, owner_of
from .watch.parameters import Operands, amplifications, gains_of

SEEDS = 5
FAILURE, HIGH, LOW = 2.0, 0.5, -0.05  # nats above ln V
SHALLOW, DEEP = 4, 16  # layers
OFF_CENTRE, ODD_CENTRE = 10.0, 1.5  # means, in standard deviations; below 1 in public models
ENOUGH = 2**18  # numbers of a tensor, to see that they are random
TOO_LARGE, LARGE = 8.0, 4.0  # times as large as its input a projection's output may be; below 2 in public models
WIDER = 8  # times its width, at which projections are measured: weights that do not scale with width show there
MANY = 256  # weights, among which the largest is near the bound of what they are drawn from
FEW = 4  # rows or columns below which a mean is not meaningful
AROUND_ZERO = 3.0  # standard deviations
STEPS = 3  # after which the tokens must matter even if some weights start at zero
TOO_STEEP = 4.0  # growth from layer 8 to 16: √2 for independent updates, 2 for equal ones, 256 if each layer doubles


def _fresh(subject: Subject, seed: int = 0, **sizes: Any) -> nn.Module:
    """A model as its constructor leaves it. Seeds every global generator, since some models draw weights with NumPy."""
    with seeded(subject.seed + seed):
        return subject.build(seed=subject.seed + seed, **sizes)


@needs(*READABLE)
def check_loss_starts_near_uniform(subject: Subject) -> None:
    """An untrained model must give all next tokens about the same probability: its loss is near ln V."""
    if not subject.builds_afresh or not _drawn(subject):
        raise NotApplicable("no weight depends on the seed: the weights may already be trained")
    V, models = subject.sizes.vocab_size, [_fresh(subject, seed) for seed in range(SEEDS)]
    losses = [_first_loss(subject, model, seed) for seed, model in enumerate(models)]
    model, loss, uniform = models[-1], median(losses), math.log(V)
    note(loss=loss, uniform=uniform)
    if not loss - uniform <= FAILURE:
        if _left_to_pytorch(model) and _first_loss(subject, _with_narrow_embeddings(model), SEEDS - 1) <= (
            uniform + FAILURE
        ):
            advise(
                f"the loss at initialization is {loss:.3g} (ln {V} = {uniform:.3g}): weights are left as PyTorch draws "
                "them, and nn.Embedding with a standard deviation of 1; with 0.02 training need not first unlearn that"
            )
            return
        fail(
            f"at initialization the loss on random tokens is {loss:.3g} (median of {SEEDS} seeds), expected about "
            f"ln {V} = {uniform:.3g}: the model makes confident predictions before it has learned anything",
            likely=("init-std-one", "logits-multiplied-by-width"),
            advice="Draw the embeddings and the head with a standard deviation of about 0.02 (nn.Embedding's default "
            "is "
            "1, also for a tied head), and normalize the last hidden state.",
            losses=losses,
            widest=_widest(model),
        )
    if loss - uniform > HIGH:
        advise(f"the loss at initialization is {loss:.3g}, {loss - uniform:.2g} above ln {V}: are weights too large?")
    if loss - uniform < LOW:
        advise(
            f"the loss at initialization is {loss:.3g}, below ln {V}: the weights may be trained, or the logits scaled"
        )


def _first_loss(subject: Subject, model: nn.Module, seed: int) -> float:
    """In nats, of random tokens and random targets."""
    tokens = subject.tokens(4, subject.sizes.block_size, seed=subject.seed + seed)
    targets = subject.tokens(4, subject.sizes.block_size, seed=subject.seed + seed + SEEDS)
    with torch.no_grad():
        logits = subject.logits(model, tokens).double()
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def _left_to_pytorch(model: nn.Module) -> bool:
    """Whether every nn.Linear has the weights that its constructor draws: uniform up to 1/√fan_in.

    A head may be tied to an embedding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [
        module.weight.detach()
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings and module.weight.numel() >= MANY
    ]
    return all(0.9 < float(weight.abs().max()) * weight.shape[1] ** 0.5 <= 1.0 + 1e-6 for weight in weights)


def _with_narrow_embeddings(model: nn.Module) -> nn.Module:
    """The model with its embeddings drawn with a standard deviation of 0.02 wherever it is 1. Changes it."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and 0.8 < float(module.weight.std()) < 1.2:
                module.weight.mul_(0.02)
    return model


def _widest(model: nn.Module) -> dict[str, float]:
    """The three matrices with the largest standard deviations."""
    spreads = {name: float(value.detach().std()) for name, value in model.named_parameters() if value.dim() > 1}
    return dict(sorted(spreads.items(), key=lambda item: -item[1])[:3])


def _drawn(subject: Subject) -> set[str]:
    """The parameters that differ between seeds. For a model instance, those whose values look random."""
    one = _state(_fresh(subject))
    if not subject.builds_afresh:
        return {name for name, value in one.items() if value.dim() > 1 and _looks_random(value)}
    other = _state(_fresh(subject, seed=1))
    return {name for name, value in one.items() if name in other and _apart(value, other[name])}


def _looks_random(value: Tensor) -> bool:
    """Whether most numbers occur once; of a large tensor some are looked at, which need not be sorted for long."""
    some = value.flatten()[:: max(value.numel() // ENOUGH, 1)]
    return 2 * len(torch.unique(some)) > len(some)


@needs(*READABLE)
def check_layers_start_different(subject: Subject) -> None:
    """No two layers, heads or experts may start with the same random weights."""
    model, drawn = _fresh(subject), _drawn(subject)
    # equal biases do no harm: the matrices make the layers differ
    random = {name: value for name, value in model.named_parameters() if name in drawn and value.dim() > 1}
    families: dict[str, list[str]] = defaultdict(list)
    for name in random:
        families[_without_numbers(name)].append(name)
    families = {family: names for family, names in families.items() if len(names) > 1}
    if not families:
        raise NotApplicable("no two layers of the same kind have random weights")
    copies = [
        (first, second)
        for names in families.values()
        for first, second in combinations(names, 2)
        if not _apart(random[first], random[second])
    ]
    for first, second in copies:
        if not _copied_by_torch(model, second):
            _blame_copy(model, first, second)
    if copies:
        first, second = copies[0]
        advise(
            f"{second} starts with exactly the weights of {first}: {_copied_by_torch(model, second)} copies one layer. "
            "The layers get different inputs and diverge in training; redraw every matrix after construction "
            "(nn.init.xavier_uniform_) to start them different"
        )


def _without_numbers(name: str) -> str:
    """`blocks.#.norm` for `blocks.0.norm` and `blocks.1.norm`."""
    return re.sub(r"\d+", "#", name)


def _apart(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a.flatten()[:64], b.flatten()[:64]) or not torch.equal(a, b)


def _blame_copy(model: nn.Module, first: str, second: str) -> None:
    owner = second.rpartition(".")[0]
    fail(
        f"{second} starts with exactly the weights of {first}: given equal inputs, the two layers never become "
        "different",
        where=locate(model, owner or type(model).__name__),
        likely=("layers-identical-at-init", "every-layer-seeded-alike"),
        advice="Build every layer with its own constructor call, in a loop, instead of copying one with copy.deepcopy.",
        parameters=[first, second],
    )


def _copied_by_torch(model: nn.Module, parameter: str) -> str:
    """The PyTorch module around a parameter that makes its layers as copies of one; "" if there is none."""
    parts = parameter.split(".")
    around = [model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts))]
    stacks = [module for module in around if type(module) in (nn.TransformerEncoder, nn.TransformerDecoder)]
    return f"nn.{type(stacks[0]).__name__}" if stacks else ""


@needs(*READABLE)
def check_seed_decides_the_weights(subject: Subject) -> None:
    """The same seed must give the same weights, and another seed different ones."""
    if not subject.builds_afresh:
        raise NotApplicable("your model is an instance: it cannot be built again")
    one, again, other = (_state(_fresh(subject, seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        if _apart(value, again[name]):
            fail(
                f"two models built from the same seed differ in {name}, by up to {farthest(value, again[name]):.3g}: "
                "no run can be reproduced",
                likely=("weights-from-their-own-generator",),
                advice="Draw weights from PyTorch's global generator, or from a generator seeded from it.",
                parameter=name,
            )
    varied = [name for name, value in one.items() if value.is_floating_point() and torch.unique(value).numel() > 2]
    fixed = [name for name in varied if not _apart(one[name], other[name])]
    seeding = _seeding_constructor(subject) if fixed else None
    if seeding:
        fail(
            f"two models built from different seeds have the same {fixed[0]}: the constructor seeds the global "
            "generator, which also affects everything drawn later",
            where=seeding,
            likely=("constructor-seeds", "every-layer-seeded-alike"),
            advice="Remove manual_seed from the model: the training program should choose the seed.",
            fixed=fixed,
        )
    if len(fixed) == len(varied):
        raise NotApplicable("no weight depends on the seed: all are constant or loaded")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _seeding_constructor(subject: Subject) -> Where | None:
    """The line of the subject's code that calls torch.manual_seed while a model is built."""
    lines: list[Where | None] = []
    seed_generator = torch.manual_seed

    def spy(seed: int) -> torch.Generator:
        if not called_by_checks():
            lines.append(line_now())
        return seed_generator(seed)

    with patch.object(torch, "manual_seed", spy), patch.object(torch.random, "manual_seed", spy):
        _fresh(subject)
    return lines[0] if lines else None


@needs(*READABLE)
def check_depth_does_not_blow_up(subject: Subject) -> None:
    """At initialization, the residual stream and the logits must not grow exponentially with depth."""
    if not subject.can_vary("n_layer"):
        raise NotApplicable("the number of layers cannot be varied")
    shallow, deep = (_signal(subject, depth) for depth in (SHALLOW, DEEP))
    note(stream=deep.stream, logits={SHALLOW: shallow.logits, DEEP: deep.logits})
    half = len(deep.stream) // 2
    steps = [after / before for before, after in pairwise(deep.stream[half - 1 :]) if before > 0]
    growth = median(steps) ** half if steps else 1.0  # the median: one layer with larger weights is no growth
    if not growth <= TOO_STEEP:
        fail(
            f"at initialization the residual stream grows {growth:.3g} times from layer {half} to layer {2 * half} "
            f"(root mean square {deep.stream[half - 1]:.3g} to {deep.stream[-1]:.3g}): it grows exponentially with "
            "depth. Adding normalized updates gives about 1.41 times",
            where=deep.place,
            likely=("residual-doubled",),
            advice="Look for x added twice, a missing norm, or weights drawn too large: each sublayer should add one "
            "update of bounded size to x.",
        )
    if not (deep.logits <= 2 * TOO_STEEP * shallow.logits or shallow.logits == 0):
        fail(
            f"at initialization the logits have a standard deviation of {deep.logits:.3g} with {DEEP} layers, but "
            f"{shallow.logits:.3g} with {SHALLOW}; at most {2 * TOO_STEEP:g} times as much is expected",
            likely=("residual-doubled", "logits-multiplied-by-width"),
            advice="Normalize the residual stream before the head.",
        )


@dataclass
class _Signal:
    stream: list[float]  # root mean square after each layer
    place: Where | None
    logits: float


def _signal(subject: Subject, depth: int) -> _Signal:
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


@needs(*READABLE)
def check_matrices_start_centred(subject: Subject) -> None:
    """Randomly drawn matrices and embeddings must be drawn around zero."""
    model, drawn = _fresh(subject), _drawn_afresh(subject)
    with torch.no_grad(), Operands(model) as operands:
        subject.logits(model, _few_tokens(subject))
    used = drawn & (operands.multipliers | operands.looked_up)
    means = {
        name: float(value.detach().double().mean() / value.detach().double().std())
        for name, value in model.named_parameters()
        if name in used and value.dim() == 2 and min(value.shape) >= FEW
    }
    if not means:
        raise NotApplicable("no randomly drawn matrix was seen in use")
    name = _first_above(OFF_CENTRE, {name: abs(mean) for name, mean in means.items()})
    note(means_in_deviations={n: round(m, 3) for n, m in means.items() if abs(m) > 1})
    value = model.get_parameter(name).detach()
    says = (
        f"{name} starts with a mean of {float(value.mean()):.3g}, {abs(means[name]):.3g} times its standard deviation "
        f"of {float(value.std()):.3g}"
    )
    if abs(means[name]) > OFF_CENTRE:
        others = sum(abs(mean) > OFF_CENTRE for mean in means.values()) - 1
        fail(
            f"{says}: its output is nearly the same for every input"
            + (f". The same holds for {others} more" if others else ""),
            where=owner_of(model, name),
            likely=("init-mean-one",),
            advice="Draw around zero: normal_(weight, mean=0.0, std=0.02). A mean of one is for the gains of norms.",
            means=means,
        )
    if abs(means[name]) > ODD_CENTRE:
        advise(f"{says}: it may be drawn with torch.rand, from 0 to 1. Weights are usually drawn around zero")


def _first_above(bound: float, values: dict[str, float]) -> str:
    """The first above the bound, in the order of the model; the largest if none is."""
    return next((name for name, value in values.items() if value > bound), max(values, key=lambda n: values[n]))


def _few_tokens(subject: Subject) -> Tensor:
    return subject.tokens(2, min(8, subject.sizes.block_size), seed=subject.seed)


def _drawn_afresh(subject: Subject) -> set[str]:
    """The random parameters. Raises NotApplicable if there are none, or if the model cannot be built again."""
    drawn = _drawn(subject) if subject.builds_afresh else set()
    if not drawn:
        raise NotApplicable("no weight depends on the seed: the weights may already be trained")
    return drawn


@needs(*READABLE)
def check_gains_do_not_start_around_zero(subject: Subject) -> None:
    """The gain of a norm must not start as random noise around zero."""
    model, drawn = _fresh(subject), _drawn_afresh(subject)
    noisy = [name for name, value in model.named_parameters() if name in drawn and _noise_around_zero(value.detach())]
    if not noisy:
        return
    gains = gains_of(model, lambda: subject.logits(model, _few_tokens(subject)))
    wrong = [name for name in noisy if name in gains]
    if not wrong:
        return
    gain = model.get_parameter(wrong[0]).detach()
    fail(
        f"the gain {wrong[0]} starts as random noise (mean {float(gain.mean()):.2g}, standard deviation "
        f"{float(gain.std()):.2g}, {int((gain < 0).sum())} of {gain.numel()} below zero): it scales every feature at "
        "random and flips the sign of many" + (f". The same holds for {len(wrong) - 1} more" if len(wrong) > 1 else ""),
        where=owner_of(model, wrong[0]),
        likely=("gains-redrawn-with-the-matrices",),
        advice="Start gains at one. A loop that redraws every parameter must skip vectors: if p.dim() > 1.",
        gains=wrong,
    )


def _noise_around_zero(value: Tensor) -> bool:
    """Whether a vector has entries of both signs and a mean near zero compared with its standard deviation."""
    if value.dim() != 1 or value.numel() < FEW:
        return False
    below = float((value < 0).double().mean())
    return 0.1 < below < 0.9 and bool(value.mean().abs() < AROUND_ZERO * value.std())


@needs(*READABLE, "check_initialization.check_loss_starts_near_uniform")
def check_projections_keep_the_size(subject: Subject) -> None:
    """At initialization, no projection may make its input many times larger, however wide the model."""
    _drawn_afresh(subject)
    model, width = _wide(subject)
    tokens = _few_tokens(subject)
    sizes = amplifications(model, lambda: subject.logits(model, tokens))
    if not sizes:
        raise NotApplicable("no module that is a single projection was seen in use")
    name = _first_above(TOO_LARGE, sizes)
    note(largest={name: sizes[name]}, width=width)
    says = (
        f"{name} makes its input {sizes[name]:.3g} times as large in a model of width {width} (its standard "
        f"deviation is {float(model.get_parameter(name).detach().std()):.3g})"
    )
    if sizes[name] > TOO_LARGE:
        fail(
            f"at initialization {says}; about 1 or less is expected",
            where=owner_of(model, name),
            likely=("init-scale-inverted", "init-not-for-the-width"),
            advice="Draw with a standard deviation of 0.02 or 1/sqrt(inputs). For projections into the residual "
            "stream, "
            "divide it by sqrt(2 × layers).",
            sizes={n: round(size, 3) for n, size in sizes.items() if size > TOO_LARGE},
        )
    if sizes[name] > LARGE:
        advise(f"at initialization {says}; about 1 is usual for weights scaled to the width")


def _wide(subject: Subject) -> tuple[nn.Module, int]:
    """The model at a multiple of its width if that can be built, otherwise at its own width."""
    width = subject.sizes.n_embd
    if subject.can_vary("n_embd"):
        try:
            return _fresh(subject, n_embd=WIDER * width), WIDER * width
        except Exception:  # the width is fixed elsewhere
            pass
    return _fresh(subject), width


@needs(*READABLE)
def check_tokens_matter_from_the_start(subject: Subject) -> None:
    """The logits must depend on the tokens at initialization, or a few steps later if some weights start at zero."""
    if not subject.builds_afresh:
        raise NotApplicable("your model is an instance: it may already be trained")
    with seeded(subject.seed):
        model = precise(subject, None)
    tokens, others = _few_tokens(subject), _few_tokens(subject).roll(1, dims=1)
    rounding = 1e-10 if precision(subject).inside == torch.float64 else 1e-6
    if _depends(subject, model, tokens, others, rounding):
        return
    if waiting := _waiting(subject, model):
        raise NotApplicable("some weights must be loaded first: they are frozen or uninitialized", weights=waiting)
    for _ in range(STEPS):
        _step(model, F.cross_entropy(subject.logits(model, tokens).flatten(0, 1), others.flatten()), rounding)
    if _depends(subject, model, tokens, others, rounding):
        raise NotApplicable(f"at initialization all texts have the same logits, but {STEPS} steps later they differ")
    fail(
        f"at initialization the logits are the same for all tokens, and still after {STEPS} steps: the gradients do "
        "not depend on the tokens",
        likely=("init-constant", "init-zero"),
        advice="Draw the matrices at random: equal weights make all features equal, which a layer norm turns into "
        "zeros, "
        "and zero weights pass nothing on.",
    )


def _waiting(subject: Subject, model: nn.Module) -> list[str]:
    """Weights to be filled by something else: frozen matrices, and memory that the constructor does not initialize."""
    frozen = [name for name, value in model.named_parameters() if value.dim() > 1 and not value.requires_grad]
    if frozen:
        return frozen
    with uninitialized_memory_is_nan():
        return [name for name, value in _fresh(subject).named_parameters() if value.isnan().any()]


def _step(model: nn.Module, loss: Tensor, rounding: float) -> None:
    """One step of gradient descent, scaled to the largest entry. Importing an optimizer would take seconds.

    Entries that may be rounding errors are skipped: after a norm of equal features they would grow from step to step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
    largest = max((float(g.abs().max()) for g in gradients if g is not None and g.numel()), default=0.0)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if gradient is not None and largest > rounding:
                parameter.sub_(gradient.where(gradient.abs() > rounding, 0.0), alpha=0.1 / largest)


def _depends(subject: Subject, model: nn.Module, tokens: Tensor, others: Tensor, rounding: float) -> bool:
    with torch.no_grad():
        one, other = (subject.logits(model, each).double() for each in (tokens, others))
    return farthest(one, other) > rounding * max(1.0, float(one.abs().max()))
