"""What a model is before its first step: a uniform guess, different layers, weights of a size and a mean that train."""

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
from .watch.location import called_by_checks, line_now, locate
from .watch.parameters import Operands, amplification, first_inputs, gains_of

SEEDS = 5
FAILURE, HIGH, LOW = 2.0, 0.5, -0.05  # nats above ln V
SHALLOW, DEEP = 4, 16  # layers
OFF_CENTRE, ODD_CENTRE = 10.0, 1.5  # means, in deviations; those of public models are below 1
TOO_LARGE, LARGE = 8.0, 4.0  # how much larger a projection makes what it is given; public models: below 2
WIDER = 8  # times its width, at which a model is asked: what is drawn for one width only shows at another
FEW = 4  # rows or columns below which a mean says little
AROUND_ZERO = 3.0  # deviations
STEPS = 3  # in which weights that start at zero have let the tokens through
TOO_STEEP = 4.0  # growth of the stream from layer 8 to 16: √2 by independent updates, 2 by equal ones, 256 if doubled


def _fresh(subject: Subject, seed: int = 0, **sizes: Any) -> nn.Module:
    """A model as its constructor leaves it, with every global generator seeded: some draw weights with NumPy."""
    with seeded(subject.seed + seed):
        return subject.build(seed=subject.seed + seed, **sizes)


@needs(*READABLE)
def check_loss_starts_near_uniform(subject: Subject) -> None:
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


def _drawn(subject: Subject) -> set[str]:
    """The parameters whose values are random: another seed gives others. Of an instance, those that look random."""
    one = _state(_fresh(subject))
    if not subject.builds_afresh:
        return {name for name, value in one.items() if value.dim() > 1 and 2 * len(value.unique()) > value.numel()}
    other = _state(_fresh(subject, seed=1))
    return {name for name, value in one.items() if name in other and _apart(value, other[name])}


@needs(*READABLE)
def check_layers_start_different(subject: Subject) -> None:
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
            "They see different inputs and grow apart; drawing every matrix anew after construction "
            "(nn.init.xavier_uniform_) starts them different"
        )


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


def _copied_by_torch(model: nn.Module, parameter: str) -> str:
    """The stack of PyTorch's own around a parameter, which makes its layers as copies of one; "" if there is none."""
    parts = parameter.split(".")
    around = [model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts))]
    stacks = [module for module in around if type(module) in (nn.TransformerEncoder, nn.TransformerDecoder)]
    return f"nn.{type(stacks[0]).__name__}" if stacks else ""


@needs(*READABLE)
def check_seed_decides_the_weights(subject: Subject) -> None:
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


def _seeding_constructor(subject: Subject) -> Where | None:
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


@needs(*READABLE)
def check_depth_does_not_blow_up(subject: Subject) -> None:
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
    """Matrices and embeddings that are drawn at random are drawn around zero."""
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
        raise NotApplicable("no matrix whose use can be seen is drawn at random")
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
            f"{says}: to every input it gives nearly the same, whatever is in it"
            + (f"; so do {others} more" if others else ""),
            where=_owner(model, name),
            likely=("init-mean-one",),
            advice="draw around zero: normal_(weight, mean=0.0, std=0.02); a mean of one is for the gains of norms",
            means=means,
        )
    if abs(means[name]) > ODD_CENTRE:
        advise(f"{says}: is it drawn with torch.rand, from 0 to 1? Around zero nothing is favoured")


def _first_above(bound: float, values: dict[str, float]) -> str:
    """The first in the order of the model that is above the bound; the largest if none is."""
    return next((name for name, value in values.items() if value > bound), max(values, key=lambda n: values[n]))


def _few_tokens(subject: Subject) -> Tensor:
    return subject.tokens(2, min(8, subject.sizes.block_size), seed=subject.seed)


def _drawn_afresh(subject: Subject) -> set[str]:
    """The random parameters of a subject that is built again for each seed. Raises NotApplicable if there are none."""
    drawn = _drawn(subject) if subject.builds_afresh else set()
    if not drawn:
        raise NotApplicable("no weight depends on the seed: they may be trained")
    return drawn


def _owner(model: nn.Module, parameter: str) -> Where:
    return locate(model, parameter.rpartition(".")[0] or type(model).__name__)


@needs(*READABLE)
def check_gains_do_not_start_around_zero(subject: Subject) -> None:
    """What a norm multiplies its features by does not start as noise around zero."""
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
        f"the gain {wrong[0]} starts as noise: mean {float(gain.mean()):.2g}, standard deviation "
        f"{float(gain.std()):.2g}, {int((gain < 0).sum())} of {gain.numel()} below zero; every feature is scaled at "
        "random and many are turned round" + (f". So are {len(wrong) - 1} more" if len(wrong) > 1 else ""),
        where=_owner(model, wrong[0]),
        likely=("gains-redrawn-with-the-matrices",),
        advice="gains start at one. A loop that draws every parameter anew must leave vectors out: if p.dim() > 1",
        gains=wrong,
    )


def _noise_around_zero(value: Tensor) -> bool:
    """Whether a vector differs from feature to feature, with both signs, and has a mean near zero for its spread."""
    if value.dim() != 1 or value.numel() < FEW:
        return False
    below = float((value < 0).double().mean())
    return 0.1 < below < 0.9 and bool(value.mean().abs() < AROUND_ZERO * value.std())


@needs(*READABLE, "check_initialization.check_loss_starts_near_uniform")
def check_projections_keep_the_size(subject: Subject) -> None:
    """At initialization no projection makes what it is given many times larger, however wide the model."""
    _drawn_afresh(subject)
    model, width = _wide(subject)
    tokens = _few_tokens(subject)
    with Operands(model) as operands, recorded(model) as calls:
        logits = subject.logits(model, tokens)
    sizes = _sizes(model, operands.multipliers, first_inputs(calls), _gradients(model, logits))
    if not sizes:
        raise NotApplicable("no module that is one projection was seen at work")
    name = _first_above(TOO_LARGE, sizes)
    note(largest={name: sizes[name]}, width=width)
    says = (
        f"{name} makes what it is given {sizes[name]:.3g} times as large in a model of width {width} (its standard "
        f"deviation is {float(model.get_parameter(name).detach().std()):.3g})"
    )
    if sizes[name] > TOO_LARGE:
        fail(
            f"at initialization {says}; matrices drawn for their width give about 1 or less",
            where=_owner(model, name),
            likely=("init-scale-inverted", "init-not-for-the-width"),
            advice="draw with a standard deviation of 0.02 or 1/sqrt(inputs); what writes to the residual stream is "
            "divided by sqrt(2 × layers), not multiplied",
            sizes={n: round(size, 3) for n, size in sizes.items() if size > TOO_LARGE},
        )
    if sizes[name] > LARGE:
        advise(f"at initialization {says}: drawn for its width it would give about 1")


def _wide(subject: Subject) -> tuple[nn.Module, int]:
    """The model at a multiple of its width where it can be had so, else as it is."""
    width = subject.sizes.n_embd
    if subject.can_vary("n_embd"):
        try:
            return _fresh(subject, n_embd=WIDER * width), WIDER * width
        except Exception:  # a width fixed elsewhere
            pass
    return _fresh(subject), width


def _gradients(model: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not logits.requires_grad:
        return {}
    found = torch.autograd.grad(logits.double().square().sum(), list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _sizes(
    model: nn.Module, matrices: set[str], inputs: dict[str, Tensor], gradients: dict[str, Tensor]
) -> dict[str, float]:
    """How much each module that is one matrix makes of its input, those left out that nothing follows from yet.

    A low-rank adaptation is such: its first matrix may be large, as the second starts at zero.
    """
    found = {}
    for name in (name for name in gradients if name in matrices):
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        alone = [id(p) for p in module.parameters() if p.dim() > 1] == [id(model.get_parameter(name))]
        if alone and owner in inputs and gradients[name].any():
            size = amplification(module, inputs[owner])
            if size is not None:
                found[name] = size
    return found


@needs(*READABLE)
def check_tokens_matter_from_the_start(subject: Subject) -> None:
    """The logits depend on the tokens at initialization, or do after a few steps from weights that start at zero."""
    if not subject.builds_afresh:
        raise NotApplicable("an instance was handed in: it may be trained")
    with seeded(subject.seed):
        model = precise(subject, None)
    tokens, others = _few_tokens(subject), _few_tokens(subject).roll(1, dims=1)
    rounding = 1e-10 if precision(subject).inside == torch.float64 else 1e-6
    if _depends(subject, model, tokens, others, rounding):
        return
    if waiting := _waiting(subject, model):
        raise NotApplicable("there are weights to be loaded: frozen, or never filled", weights=waiting)
    for _ in range(STEPS):
        _step(model, F.cross_entropy(subject.logits(model, tokens).flatten(0, 1), others.flatten()), rounding)
    if _depends(subject, model, tokens, others, rounding):
        raise NotApplicable(f"at initialization every text has the same logits; {STEPS} steps later it has its own")
    fail(
        f"at initialization the logits are the same for all tokens, and still after {STEPS} steps: no gradient tells "
        "one token from another",
        likely=("init-constant", "init-zero"),
        advice="draw the matrices at random: with equal weights all features are one, and a norm makes nothing of it; "
        "zeros let nothing through",
    )


def _waiting(subject: Subject, model: nn.Module) -> list[str]:
    """Weights that something else is to fill: frozen matrices, and memory that the constructor leaves as it got it."""
    frozen = [name for name, value in model.named_parameters() if value.dim() > 1 and not value.requires_grad]
    if frozen:
        return frozen
    with uninitialized_memory_is_nan():
        return [name for name, value in _fresh(subject).named_parameters() if value.isnan().any()]


def _step(model: nn.Module, loss: Tensor, rounding: float) -> None:
    """Down the gradient, as far as its largest entry allows; importing any optimizer takes seconds.

    What may be rounding is left out: behind a norm of equal features it would grow from step to step.
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
