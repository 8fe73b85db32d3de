"""What a declared architecture fixes for training: how weights are initialized, their gradients, where dropout is.

GPT-2's initialization (Radford et al. 2019, and the code published with it) is normal with standard deviation 0.02
(0.01 for positions, in the code), output projections divided by √(2 L), biases zero and gains one. It is judged on
values pooled over seeds and layers, by standard errors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...expect import NotApplicable, Where
from ...probes.rounding import in_float64
from ...subject import cast
from ...watch.draws import seeded
from ...watch.dropout import set_rates
from ...watch.location import line_now
from ..closeness import apart, explicit
from ..reference import build
from ..specimen import Fit, Specimen
from ..trace import Checkpoint, alike, checkpoints, sums
from ..weights.inventory import Weight
from ..weights.roles import Norm, Plan

SEEDS = 4
DEVIATION, POSITIONS = 0.02, (0.02, 0.01)
ERRORS = 6.0  # standard errors: correct weights are further off once in 5e8
SLACK = 0.015  # of the deviation: a normal distribution truncated at three deviations has 1.3 % less
SILENT = 1e-12  # of the largest gradient: two smaller gradients count as equal (a key's bias has none)
RATE = 0.3
DROPOUTS = {"dropout", "dropout_", "alpha_dropout", "feature_dropout", "native_dropout"}
# The tensors of the reference, by their names in trace.py, to which GPT-2 applies dropout.
SITES = {
    "embedded tokens and positions": "the embedding", "token embedding": "the embedding",
    "attention weights": "attention weights", "attention output": "attention's output",
    "feed-forward output": "the feed-forward's output",
}  # fmt: skip


def sizes_of(specimen: Specimen, **more: float) -> dict[str, Any]:
    """The sizes that build another model like the specimen, as far as the subject takes them."""
    shape, layers = specimen.shape, len(specimen.inventory.layers)
    sizes: dict[str, Any] = dict(vocab_size=shape.vocab_size, block_size=shape.block_size, n_head=shape.n_head,
                                 n_embd=shape.n_embd, n_layer=layers, **more)  # fmt: skip
    return {name: value for name, value in sizes.items() if specimen.subject.can_vary(name)}


# -- initialization


@dataclass(frozen=True)
class InitialMatrices:
    """The initial values of all matrices of one role, over seeds and layers."""

    role: str
    name: str  # of the first of them
    values: Tensor
    wanted: tuple[float, ...]  # standard deviations that the rule allows

    @property
    def deviation(self) -> float:
        return float(self.values.std())

    def tolerance(self, wanted: float) -> float:
        return wanted * (ERRORS / math.sqrt(2 * len(self.values)) + SLACK)

    @property
    def fits(self) -> bool:
        centred = abs(float(self.values.mean())) <= ERRORS * self.deviation / len(self.values) ** 0.5
        return centred and any(abs(self.deviation - w) <= self.tolerance(w) for w in self.wanted)


@dataclass(frozen=True)
class InitialConstant:
    """The initial values, over seeds, of a vector that should start as one number."""

    role: str  # "bias" or "gain"
    name: str
    values: Tensor
    wanted: float

    @property
    def fits(self) -> bool:
        return bool((self.values == self.wanted).all())


def initialization(fit: Fit) -> tuple[list[InitialMatrices], list[InitialConstant]]:
    """Raises NotApplicable where a new model's weights are not newly drawn, or are not found by their names."""
    plan, models = fit.plan, _models(fit.specimen)
    assert plan is not None
    L = len(plan.inventory.layers)
    matrices = [InitialMatrices(role, weights[0].name, _pooled(models, weights), wanted)
                for role, weights, wanted in _roles(plan, L)]  # fmt: skip
    constants = [InitialConstant(role, weight.name, _pooled(models, [weight]), wanted)
                 for role, weight, wanted in _constants(plan)]  # fmt: skip
    return matrices, constants


def _models(specimen: Specimen) -> list[dict[str, Tensor]]:
    subject, sizes = specimen.subject, sizes_of(specimen)
    if not subject.builds_afresh:
        raise NotApplicable("the model is an instance, whose weights may have been trained")
    models = []
    for seed in range(SEEDS):
        with seeded(subject.seed + seed):
            models.append(_values(subject.build(seed=subject.seed + seed, **sizes)))
    if all(torch.equal(models[0][name], models[1][name]) for name in models[0]):
        raise NotApplicable("no weight depends on the seed: the weights may have been trained")
    return models


def _values(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: value.detach().double().clone() for name, value in named}


def _pooled(models: list[dict[str, Tensor]], weights: list[Weight]) -> Tensor:
    missing = [w.name for w in weights if w.name not in models[0]]
    if missing:
        raise NotApplicable(f"{missing[0]} is not among the model's named parameters")
    return torch.cat([model[w.name].flatten() for model in models for w in weights])


def _roles(plan: Plan, L: int) -> Iterator[tuple[str, list[Weight], tuple[float, ...]]]:
    layers = plan.inventory.layers
    yield "token embedding", [plan.embedding], (DEVIATION,)
    if plan.positions is not None and plan.positions.trained:
        yield "position table", [plan.positions], POSITIONS
    for matrix in plan.attention:
        yield "queries, keys and values", [layer[matrix.at] for layer in layers], (DEVIATION,)
    for matrix in plan.feed_forward:
        yield "feed-forward input", [layer[matrix.at] for layer in layers], (DEVIATION,)
    for role, matrix in (("attention output", plan.output), ("feed-forward output", plan.feed_forward_output)):
        yield role, [layer[matrix.at] for layer in layers], (DEVIATION / (2 * L) ** 0.5,)
    if not plan.tied:
        yield "head", [plan.head], (DEVIATION,)


def _constants(plan: Plan) -> Iterator[tuple[str, Weight, float]]:
    for layer in plan.inventory.layers:
        for matrix in (*plan.attention, plan.output, *plan.feed_forward, plan.feed_forward_output):
            if matrix.bias is not None:
                yield "bias", layer[matrix.bias], 0.0
        for norm in (plan.attention_norm, plan.feed_forward_norm):
            yield from _norm(norm, layer)
    yield from _norm(plan.final_norm, None)


def _norm(norm: Norm | None, layer: list[Weight] | None) -> Iterator[tuple[str, Weight, float]]:
    if norm is None:
        return
    for role, place, wanted in (("gain", norm.gain, 0.0 if norm.minus_one else 1.0), ("bias", norm.bias, 0.0)):
        weight = layer[place] if layer is not None and isinstance(place, int) else place
        if isinstance(weight, Weight):
            yield role, weight, wanted


# -- gradients


@dataclass(frozen=True)
class GradientPair:
    """The gradient of one weight in the reference, and of the same weight in the subject."""

    part: str  # blocks.0.attention.qkv.weight
    theirs: str  # the subject's name of the weight, or of the first of several that it consists of
    error: float  # largest difference, relative to the tensor's largest gradient
    ratio: float  # the subject's gradient as a multiple of the reference's, by least squares


def gradients(fit: Fit) -> list[GradientPair]:
    """The gradients of a random combination of the logits, for every weight that both models train."""
    assert fit.plan is not None and fit.variant is not None
    specimen = fit.specimen
    ours = build(fit.plan, fit.variant)
    direction = torch.randn(fit.theirs.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    specimen.model.zero_grad(set_to_none=True)
    with torch.enable_grad(), specimen.running():
        torch.autograd.backward((specimen.subject.logits(specimen.model, specimen.tokens) * direction).sum())
        torch.autograd.backward((ours(specimen.tokens)[..., : fit.theirs.shape[-1]] * direction).sum())
    trained = {name: w.grad for name, w in ours.named_parameters() if w.grad is not None}
    theirs, names = fit.plan.state(_gradient), _names(fit.plan)
    largest = max(float(gradient.abs().max()) for gradient in trained.values())
    pairs = [_pair(name, names.get(name, name), theirs[name], gradient, largest)
             for name, gradient in trained.items() if name in theirs]  # fmt: skip
    specimen.model.zero_grad(set_to_none=True)
    return pairs


def _gradient(weight: Weight) -> Tensor | None:
    """None for a weight that is not trained; zeros for one that gets no gradient."""
    if not weight.tensor.requires_grad:
        return None
    return torch.zeros_like(weight.tensor) if weight.tensor.grad is None else weight.tensor.grad


def _pair(part: str, name: str, theirs: Tensor, ours: Tensor, largest: float) -> GradientPair:
    if float((theirs - ours).abs().max()) <= SILENT * largest:
        return GradientPair(part, name, 0.0, 1.0)
    ratio = float((theirs * ours).sum() / ours.square().sum().clamp(min=1e-300))
    return GradientPair(part, name, apart(theirs, ours), ratio)


def _names(plan: Plan) -> dict[str, str]:
    """The subject's names by the reference's: each weight is filled with a number, and these are mapped."""
    weights = plan.inventory.weights
    numbers = {id(weight): torch.full_like(weight.tensor, float(n)) for n, weight in enumerate(weights)}
    mapped = plan.state(lambda weight: numbers.get(id(weight)))
    return {name: weights[int(tensor.flatten()[0])].name for name, tensor in mapped.items()}


# -- dropout


@dataclass(frozen=True)
class Dropout:
    """One application of dropout: to what, in which block, at which rate and line."""

    part: str | None  # a tensor's name in trace.py; None where the reference computes no such tensor
    block: int | None
    rate: float
    where: Where | None


@dataclass(frozen=True)
class Drop:
    """One dropout of a forward: the sums of what it is applied to; None inside a fused kernel, of `scores` scores."""

    sums: Tensor | None
    rate: float
    where: Where | None
    scores: int = 0


class DropoutOff(TorchFunctionMode):
    """Every dropout returns its input unchanged, and is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Drop] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            x = args[0] if args else kwargs["input"]
            rate = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
            if kwargs.get("training", args[2] if len(args) > 2 else True):
                self.seen.append(Drop(sums(x), rate, line_now()))
            return x
        if name == "scaled_dot_product_attention":
            rate = float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self.seen += [Drop(None, rate, line_now(), q.shape[:-1].numel() * k.shape[-2])] if rate else []
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if name == "multi_head_attention_forward":
            with self:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def dropouts(fit: Fit) -> list[Dropout]:
    """Every dropout of a forward in training mode, in order. Raises NotApplicable where some are not seen."""
    assert fit.plan is not None and fit.variant is not None
    specimen = fit.specimen
    subject, model, tokens = specimen.subject, _with_dropout(specimen), specimen.tokens
    with torch.no_grad(), specimen.running(), seeded(subject.seed), DropoutOff() as off:
        first = subject.logits(model, tokens).double()
    with torch.no_grad(), specimen.running(), seeded(subject.seed + 1), DropoutOff():
        again = subject.logits(model, tokens).double()
    if apart(first, again) > 0 or apart(first, fit.theirs) > specimen.bound.size:
        raise NotApplicable("the model applies dropout in a way that is not seen here", difference=apart(first, again))
    wanted = checkpoints(explicit(fit.plan, fit.variant), tokens)
    whole = [c for c in wanted if c.part == "attention weights"]
    found: list[Dropout] = []
    kernels = 0.0
    for drop in joined(off.seen, whole, specimen.shape.n_head):
        if drop.sums is None:
            kernels += drop.scores / float(whole[0].sums[0])  # of one head alone, where heads are modules
            if round(kernels, 6) >= 1:
                block = sum(d.part == "attention weights" for d in found)
                found.append(Dropout("attention weights", block, drop.rate, drop.where))
                kernels -= 1
            continue
        same = [c for c in wanted if alike(drop.sums, c.sums)]
        best = next((c for c in same if c.part in SITES), same[0] if same else None)
        found.append(Dropout(best.part if best else None, best.block if best else None, drop.rate, drop.where))
    return found


def joined(seen: list[Drop], whole: list[Checkpoint], H: int) -> list[Drop]:
    """The dropouts with those of H heads as one, where each head applies its own to its attention weights."""
    found, left = [], list(seen)
    while left:
        heads = [drop for drop in left[:H] if drop.sums is not None and drop.where == left[0].where]
        together = torch.stack([drop.sums for drop in heads if drop.sums is not None]).sum(0) if heads else None
        if together is not None and len(heads) == H and any(alike(together, c.sums) for c in whole):
            found.append(replace(left[0], sums=together))
            left = left[H:]
        else:
            found.append(left.pop(0))
    return found


def _with_dropout(specimen: Specimen) -> nn.Module:
    """A model with the specimen's weights and every declared rate at RATE, in training mode."""
    subject = specimen.subject
    if not subject.can_vary("dropout"):
        raise NotApplicable("the model takes no dropout rate")
    with in_float64() if specimen.dtype == torch.float64 else contextlib.nullcontext():
        model = cast(subject.build(seed=subject.seed, **sizes_of(specimen, dropout=RATE)), specimen.dtype)
    model.load_state_dict(specimen.model.state_dict())
    set_rates(model, RATE)
    return model.train()
