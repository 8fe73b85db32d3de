"""Gradients: backward must give every trainable parameter its true gradient, and must not mix rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .expect import GRADIENTS, READABLE, ROWS_APART, NotApplicable, Where, advise, fail, needs, note
from .loss.returned import trained_by_its_loss
from .probes.ablation import blocks_of
from .probes.embeddings import watched_embeddings
from .probes.influence import block_of_tokens
from .probes.module_state import renormalized
from .probes.precision import precision
from .subject import ABSENCE, EXISTENCE, Subject
from .watch.calls import Call, each, recorded
from .watch.draws import seeded
from .watch.location import locate, owner_of

ROWS = 4
MOST = 24  # parameters whose gradient is compared
FEW_TOKENS, SWEEPS = 8, 3.0  # for a large model, of which fewer are
STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
RATE = 0.3
WAITS, STEP = 3, 0.1  # steps of gradient descent, of this size, after which a weight that can learn has a gradient
FROM_THE_START = "check_initialization.check_tokens_matter_from_the_start"


def _value(subject: Subject, model: nn.Module, tokens: Tensor) -> Tensor:
    """A fixed random weighting of the logits, under a fixed random state. It is smooth, and every logit matters."""
    with seeded(subject.seed):
        logits = subject.logits(model, tokens)
    return _weighted([logits])


def _weighted(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for out in outputs:
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        total = total + (weights * out).sum() / max(out.numel(), 1) ** 0.5
    return total


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point() and p.numel()}


def _backward(model: nn.Module, objective: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    """Gradients by parameter name. A failing backward is a finding, not a crash."""
    model.zero_grad(set_to_none=True)
    value = objective()
    if not value.requires_grad:
        fail(
            "the logits have no gradient: the graph is cut somewhere in the forward",
            likely=("embedding-no-grad",),
            advice="Look for torch.no_grad(), .detach(), .data or .item() in the forward.",
        )
    try:
        torch.autograd.backward(value)
    except RuntimeError as error:
        if "inplace" not in str(error) and "in-place" not in str(error):
            raise
        fail(
            f"backward fails: {str(error).split('. Hint')[0]}",
            likely=("inplace-op-breaks-autograd",),
            advice="Write x = x + y instead of x += y, and masked_fill instead of masked_fill_, where a gradient "
            "needs the "
            "old x.",
        )
    return {name: parameter.grad for name, parameter in _trainable(model).items()}


@needs(*READABLE, "check_contract.check_nothing_projected_is_thrown_away")
def check_every_parameter_gets_a_gradient(subject: Subject) -> None:
    """Every trainable parameter must get a finite, nonzero gradient for at least one of a few draws of the weights."""
    draws = (EXISTENCE[1], None, ABSENCE) * 2  # one batch may give an expert no token, one draw may close a gate
    missing: dict[str, str] | None = None
    for number, scheme in enumerate(draws):
        model = subject.amplified(scheme, seed=subject.seed + number, dtype=torch.float32)
        without = _without_gradient(subject, model, block_of_tokens(subject, ROWS, seed=number))
        missing = without if missing is None else {name: why for name, why in without.items() if name in missing}
        if not missing:
            return
    lone = {name for name, parameter in model.named_parameters() if parameter.numel() == 1}
    if scalars := sorted(lone & set(missing or {})):
        advise(f"the scalar {', '.join(scalars)} gets no gradient")
    left = {name: why for name, why in (missing or {}).items() if name not in lone}
    if left:
        trained = trained_by_its_loss(subject, model, block_of_tokens(subject, ROWS, seed=0))  # a further head, say
        left = {name: why for name, why in left.items() if name not in trained}
    if left:
        _blame_missing(model, left)


def _without_gradient(subject: Subject, model: nn.Module, tokens: Tensor) -> dict[str, str]:
    """The parameters without a gradient, and what they get instead: "none" or "exactly 0"."""
    gradients = _backward(model, partial(_value, subject, model, tokens))
    for name, gradient in gradients.items():
        if gradient is not None and not bool(gradient.isfinite().all()):
            fail(
                f"the gradient of {name} is not finite, although the logits are",
                where=owner_of(model, name),
                likely=("fully-masked-row-nan",),
                advice="Look for a root or a logarithm of 0, a division by 0, or a NaN that torch.where only hides.",
                parameter=name,
            )
    return {
        name: "none" if gradient is None else "exactly 0"
        for name, gradient in gradients.items()
        if gradient is None or not bool(gradient.any())
    }


def _likely_missing(model: nn.Module, missing: dict[str, str]) -> tuple[str, ...]:
    """Bugs by which parameters get no gradient: whole blocks, embeddings, norms, or single projections."""
    if any(why != "none" for why in missing.values()):
        return "residual-doubled", "v-detached"
    blocks = blocks_of(model)
    silent = [block for block in blocks if any(name.startswith(f"{block}.") for name in missing)]
    whole = [
        block
        for block in silent
        if all(f"{block}.{name}" in missing for name, _ in model.get_submodule(block).named_parameters())
    ]
    if whole:
        return ("residual-doubled", "last-block-skipped") if whole == blocks else ("last-block-skipped",)
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in missing]
    if all(isinstance(owner, nn.Embedding) for owner in owners):
        return "untied-embedding-no-grad", "position-table-detached"
    if all(next(owner.parameters()).dim() < 2 for owner in owners):
        return ("norm-reused",)
    return "no-output-projection", "v-detached", "last-block-skipped"


def _blame_missing(model: nn.Module, missing: dict[str, str]) -> None:
    first = next(iter(missing))
    who = f"{first}, and {len(missing) - 1} more, get" if len(missing) > 1 else f"{first} gets"
    what = "no gradient" if missing[first] == "none" else "a gradient of exactly 0"
    fail(
        f"{who} {what}: training never changes {'them' if len(missing) > 1 else 'it'}",
        where=owner_of(model, first),
        likely=_likely_missing(model, missing),
        advice="Check that it is used in the forward, outside no_grad, and that its result is not thrown away.",
        parameters=missing,
    )


@needs(*READABLE, GRADIENTS)
def check_gradients_equal_finite_differences(subject: Subject) -> None:
    """For every parameter, the gradient from backward must equal the slope of the forward by finite differences."""
    _expect_slopes(subject, _finest(subject).eval(), "")


@needs(*READABLE, "check_gradients.check_gradients_equal_finite_differences")
def check_training_gradients_equal_finite_differences(subject: Subject) -> None:
    """In training mode, with a fixed dropout mask, backward must also give the slope of the forward."""
    model = _finest(subject, **(dict(dropout=RATE) if subject.can_vary("dropout") else {})).train()
    tokens = block_of_tokens(subject, ROWS)
    with torch.no_grad():
        one, two = (_value(subject, model, tokens) for _ in range(2))
    if not torch.equal(one, two):
        raise NotApplicable("in training mode, two forwards with the same seed differ")
    _expect_slopes(subject, model, " in training mode")


def _finest(subject: Subject, **sizes: Any) -> nn.Module:
    return subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=precision(subject).dtype, **sizes)


def _expect_slopes(subject: Subject, model: nn.Module, mode: str) -> None:
    tokens, exact = block_of_tokens(subject, ROWS)[:2], precision(subject).inside == torch.float64
    if subject.large:
        tokens = tokens[:, :FEW_TOKENS]
    value = partial(_value, subject, model, tokens)
    with seeded(subject.seed):
        gradients = _backward(model, value)
    parameters = _trainable(model)
    largest = max((float(g.norm()) for g in gradients.values() if g is not None), default=0.0)
    frozen = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    names = [name for name in parameters if name not in renormalized(model)]
    names = _some(names, subject.affordable(4 * tokens.numel(), MOST, sweeps=SWEEPS), subject.seed)
    margins = {}
    for name in names:
        gradient, parameter = gradients[name], parameters[name]
        direction = _direction([parameter], subject.seed)
        if (row := frozen.get(id(parameter))) is not None:  # padding_idx: a row that is read and never trained
            direction[0][row] = 0
        slope = 0.0 if gradient is None else float((gradient * direction[0]).sum())
        tried = _differences(value, [parameter], direction, slope, largest, exact)
        if tried.wrong:
            if rounding := _rounding(value):
                raise NotApplicable(f"the forward rounds ({rounding}): its gradient is an estimate by design")
            _blame_slope(name, slope, tried, mode, _culprit(subject, model, tokens, exact))
        margins[name] = tried.error / tried.bound
    note(largest_margin=max(margins.values(), default=0.0), parameters=len(names))


def _some(names: list[str], most: int, seed: int) -> list[str]:
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [names[i] for i in sorted(order[:most])]


class _Rounding(TorchFunctionMode):
    """Records the first rounding of a tensor with a gradient, as in quantization with a straight-through estimator."""

    ROUNDING = ("round", "sign", "sgn", "floor", "ceil", "trunc", "fix", "heaviside", "quantize", "one_hot")

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in self.ROUNDING or "quantize" in name:
            self.seen = self.seen or (name if any(isinstance(a, Tensor) and a.requires_grad for a in args) else "")
        return func(*args, **(kwargs or {}))


def _rounding(value: Callable[[], Tensor]) -> str:
    rounding = _Rounding()
    with rounding:
        value()
    return rounding.seen


def _direction(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """A random direction of length 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]
    length = sum(float(d.pow(2).sum()) for d in drawn) ** 0.5 or 1.0
    return [d / length for d in drawn]


@dataclass
class _Difference:
    """A slope by finite differences, and how far the gradient is and may be from it."""

    slope: float
    error: float  # of the gradient from backward
    apart: float  # distance from the slope at ten times the step
    bound: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.bound


def _differences(
    value: Callable[[], Tensor],
    tensors: list[Tensor],
    direction: list[Tensor],
    slope: float,
    largest: float,
    exact: bool,
) -> _Difference:
    """Central differences, at the step where they agree best with those at ten times the step.

    The bound is 30 times that disagreement, plus a thousandth of the slope, plus a millionth of the largest gradient
    (a hundredth and a thousandth in float32).
    """
    relative, floor = (1e-3, 1e-6) if exact else (1e-2, 1e-3)
    found: dict[float, float] = {}

    def at(step: float) -> float:
        if step not in found:
            found[step] = _central(value, tensors, direction, step)
        return found[step]

    def judged(step: float) -> _Difference:
        apart = abs(at(step) - at(10 * step))
        error = abs(slope - at(step))
        return _Difference(at(step), error, apart, 30 * apart + relative * abs(at(step)) + floor * largest)

    quick = judged(1e-4)
    if quick.error <= relative * abs(quick.slope) + floor * largest:
        return quick
    return min((judged(step) for step in STEPS[:-1]), key=lambda tried: tried.apart)


def _central(value: Callable[[], Tensor], tensors: list[Tensor], direction: list[Tensor], step: float) -> float:
    kept = [t.detach().clone() for t in tensors]
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            for t, before, d in zip(tensors, kept, direction, strict=True):
                t.copy_(before + sign * step * d)
            ends.append(float(value()))
        for t, before in zip(tensors, kept, strict=True):
            t.copy_(before)
    return (ends[0] - ends[1]) / (2 * step)


def _blame_slope(name: str, slope: float, tried: _Difference, mode: str, where: Where | None) -> None:
    share = slope / tried.slope if tried.slope else float("inf")
    in_training = ("checkpoint-recompute-rng", "gradient-wrong-in-training")
    always = ("residual-detached", "embedding-no-grad", "head-detached", "v-detached", "backward-of-its-own-wrong")
    fail(
        f"the gradient of {name}{mode} is wrong: along a random direction backward gives {slope:.6g}, finite "
        f"differences give {tried.slope:.6g} (a ratio of {share:.3g}). The difference is {tried.error:.2g}, allowed "
        f"{tried.bound:.1e}",
        where=where,
        likely=in_training if mode else always,
        advice="Look between this weight and the logits for .detach(), .data, torch.no_grad(), an in-place change of a "
        "saved tensor, or a custom backward.",
        parameter=name,
        backward=slope,
        differences=tried.slope,
        bound=tried.bound,
    )


def _culprit(subject: Subject, model: nn.Module, tokens: Tensor, exact: bool) -> Where | None:
    """The first module, in execution order, whose backward is wrong when it runs alone on the inputs it had."""
    with torch.no_grad(), seeded(subject.seed), recorded(model) as calls:
        subject.logits(model, tokens)
    for call in calls:
        module = model if call.module == type(model).__name__ else model.get_submodule(call.module)
        if _wrong_by_itself(module, call, subject.seed, exact):
            return locate(model, call.module)
    return None


def _wrong_by_itself(module: nn.Module, call: Call, seed: int, exact: bool) -> bool:
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.clone().requires_grad_())
        return leaves[-1]

    args, kwargs = each((call.args, call.kwargs), leaf)

    def value() -> Tensor:
        given, named = each((args, kwargs), torch.clone)
        outputs: list[Tensor] = []

        def keep(out: Tensor) -> Tensor:
            outputs.append(out)
            return out

        with seeded(seed):
            each(module(*given, **named), keep)
        return _weighted([out for out in outputs if out.is_floating_point()])

    try:
        everything = leaves + list(_trainable(module).values())
        with seeded(seed):
            gradients = torch.autograd.grad(value(), everything, allow_unused=True)
        direction = _direction(everything, seed)
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
        largest = max((float(g.norm()) for g in gradients if g is not None), default=0.0)
        return _differences(value, everything, direction, slope, largest, exact).wrong
    except Exception:  # it may not run outside its model, and cannot be judged then
        return False


@needs(*READABLE, GRADIENTS, ROWS_APART)
def check_rows_get_their_own_gradient(subject: Subject) -> None:
    """The loss of one row must have no gradient with respect to the embeddings of another row."""
    model, tokens = _finest(subject), block_of_tokens(subject, ROWS)
    with watched_embeddings(model, tokens) as embeddings:
        logits = subject.logits(model, tokens)
    if not embeddings or not logits.requires_grad:
        raise NotApplicable("no module that turns token ids into embeddings was found")
    for row in range(ROWS):
        for embedding in embeddings:
            (gradient,) = torch.autograd.grad(_weighted([logits[row]]), embedding, retain_graph=True, allow_unused=True)
            if gradient is None or ROWS not in gradient.shape:
                continue
            others = gradient.movedim(gradient.shape.index(ROWS), 0).flatten(1).abs().amax(dim=1)
            others[row] = 0
            if bool(others.any()):
                other = int(others.nonzero()[0])
                fail(
                    f"the logits of row {row} have a gradient of {float(others[other]):.3g} with respect to the "
                    f"embeddings of row {other}, expected 0: the rows of the batch are mixed",
                    likely=("norm-over-batch", "row-gradient-leak"),
                    advice="Look for a mean, norm or softmax over the batch axis, and for views that mix rows and "
                    "heads.",
                    row=row,
                    other=other,
                )


@needs(*READABLE, "check_gradients.check_every_parameter_gets_a_gradient", FROM_THE_START)
def check_no_two_zero_factors_wait_for_each_other(subject: Subject) -> None:
    """Of two weights that are multiplied at most one may start at zero: each one's gradient is a multiple of the other.

    Each is drawn at random in turn: the other gets a gradient then, and got none before.
    """
    if not subject.builds_afresh:
        raise NotApplicable("the model is one instance, and may be trained")
    model = subject.build(seed=subject.seed)
    zero = [name for name, p in _trainable(model).items() if p.dim() > 1 and not p.detach().any()]
    if len(zero) < 2:
        return
    tokens, dead = subject.tokens(ROWS, subject.sizes.block_size, seed=subject.seed), zero
    for _ in range(WAITS):
        learn = _pulled(subject, model, tokens)
        dead = [name for name in dead if name not in learn]
        with torch.no_grad():
            for name in learn:
                model.get_parameter(name).sub_(STEP * learn[name])
    for name in dead:
        drawn = subject.build(seed=subject.seed)
        with torch.no_grad(), seeded(subject.seed):
            nn.init.normal_(drawn.get_parameter(name), std=0.1)
        if waiting := sorted(_pulled(subject, drawn, tokens).keys() & set(dead) - {name}):
            fail(
                f"{name} and {waiting[0]} both start at zero and are multiplied: the gradient of each is zero as long "
                f"as the other is, so neither ever learns (both are zero after {WAITS} steps; with {name} drawn at "
                f"random {waiting[0]} gets a gradient)",
                where=owner_of(model, name),
                likely=("low-rank-factors-both-zero",),
                advice="Draw one of the two at random: in a low-rank adaptation the first, and leave zero to the "
                "second.",
                waiting=dead,
            )


def _pulled(subject: Subject, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """The gradients that are not zero, by the names of their parameters."""
    with torch.enable_grad():
        grads = _backward(model, lambda: _value(subject, model, tokens))
    return {name: grad for name, grad in grads.items() if grad is not None and bool(grad.any())}
