"""Lower precision: the error must not exceed what rounding costs, also for long, wide and extreme models."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .expect import READABLE, REPEATS, NotApplicable, Where, advise, fail, needs, note
from .probes.precision import precision
from .probes.rounding import Promoted, naively
from .subject import EXISTENCE, Subject
from .watch.calls import Call, first_bad, recorded
from .watch.casts import Casts
from .watch.location import locate

# The error allowed, in multiples of a naive evaluation's. Correct models reach 1.6 in half precision, where results are
# rounded and nothing else, and 4.9 in float32, where the sums inside an operation are rounded as well.
TIMES = {torch.float32: 20.0, torch.bfloat16: 4.0, torch.float16: 4.0}
LONG, WIDE = 512, 512
SHARP = (2.0, 1.0)  # weights that make attention so sharp that a wrong angle shows
EXTREME = 20.0


@dataclass
class Runs:
    """The logits of one model: in the finest type, naively rounded, and from the model itself."""

    exact: Tensor
    naive: Tensor
    own: Tensor
    dtype: torch.dtype
    routes: bool

    def size(self, error: Tensor) -> float:
        """The root mean square; with routing the median over tokens, since rounding may pick another expert."""
        per_token = error.double().pow(2).mean(-1)
        return float((per_token.median() if self.routes else per_token.mean()).sqrt())

    @property
    def error(self) -> float:
        return self.size(self.own - self.exact)

    @property
    def unavoidable(self) -> float:
        return self.size(self.naive - self.exact)

    @property
    def bound(self) -> float:
        floor = torch.finfo(self.dtype).eps * self.size(self.exact)
        return TIMES[self.dtype] * self.unavoidable + floor


@dataclass
class Trial:
    """What is compared: a type, how the model is brought to it, and its input."""

    what: str  # as the subject of a sentence
    dtype: torch.dtype
    tokens: Tensor
    mask: Tensor | None = None
    autocast: bool = False
    scheme: tuple[float, float] | None = EXISTENCE[1]
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def stored(self) -> torch.dtype:
        """The type of the weights."""
        return torch.float32 if self.autocast else self.dtype


def _twin(subject: Subject, trial: Trial, to: torch.dtype) -> nn.Module:
    """A model with weights that the trial's type represents exactly, converted to `to`. Its buffers are not rounded."""
    model = subject.amplified(trial.scheme, seed=subject.seed, dtype=torch.float32, **trial.sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.to(trial.stored))
    return model.to(to)


def _runs(subject: Subject, trial: Trial, *, buffers: bool = True) -> Runs:
    """With `buffers=False` the model's buffers stay in float32 when it is converted."""
    fine = precision(subject).dtype
    if trial.dtype == fine:
        raise NotApplicable(f"the model runs in no finer type than {_name(fine)}")
    twin = _twin(subject, trial, fine)
    with torch.no_grad(), Promoted(fine):
        exact = subject.logits(twin, trial.tokens, trial.mask)
    with naively(twin, trial.dtype) as mode, Promoted(fine):
        naive = subject.logits(twin, trial.tokens, trial.mask).detach()
    own = _own(subject, trial, buffers=buffers)
    if trial.mask is not None and not bool(own.isfinite().all()):
        with torch.no_grad():
            plain = subject.logits(twin, trial.tokens, trial.mask)
        if not bool(plain.isfinite().all()):
            raise NotApplicable(f"with this padding mask the model gives NaN or infinity in {_name(fine)} too")
    keep = torch.ones_like(trial.tokens, dtype=torch.bool) if trial.mask is None else trial.mask
    return Runs(exact[keep], naive[keep], own[keep].to(exact.dtype), trial.dtype, mode.routes)


def _own(subject: Subject, trial: Trial, *, buffers: bool = True) -> Tensor:
    model = _twin(subject, trial, trial.stored if buffers else torch.float32)
    if not buffers:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(trial.stored)
    with torch.no_grad(), torch.autocast(subject.device.type, dtype=trial.dtype, enabled=trial.autocast):
        return _or_refused(subject, model, trial)


def _or_refused(subject: Subject, model: nn.Module, trial: Trial) -> Tensor:
    """A type that the model or a kernel refuses is no fault. A constant that overflows gets a remark."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of mixed types under autocast
            return subject.logits(model, trial.tokens, trial.mask)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "without overflow" in reason:
            advise(
                f"{trial.what} raises an error: a constant, such as a mask fill of -1e9, overflows {_name(trial.dtype)}"
            )
        raise NotApplicable(f"the model refuses {_name(trial.dtype)}: {reason}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _judge(runs: Runs, trial: Trial, **finding: Any) -> None:
    note(error=runs.error, unavoidable=runs.unavoidable, bound=runs.bound)
    if not bool(runs.exact.isfinite().all()) or not bool(runs.naive.isfinite().all()):
        raise NotApplicable(f"the activations of this model overflow {_name(runs.dtype)}")
    place, dtype = finding.pop("where"), _name(runs.dtype)
    if not bool(runs.own.isfinite().all()):
        token = int((~runs.own.isfinite()).any(-1).nonzero()[0])
        fail(
            f"{trial.what} gives NaN or infinity, first at token {token} of {len(runs.own)}; the logits are finite if "
            f"only results are rounded to {dtype}",
            where=place(),
            **finding,
        )
    if not runs.error <= runs.bound:
        fail(
            f"{trial.what} has an error of {runs.error:.3g} (root mean square), "
            f"{runs.error / max(runs.unavoidable, 1e-300):.3g} times the {runs.unavoidable:.3g} that rounding every "
            f"result to {dtype} costs; allowed {TIMES[runs.dtype]:g} times plus one unit in the last place, "
            f"{runs.bound:.3g} in all",
            where=place(),
            error=runs.error,
            unavoidable=runs.unavoidable,
            bound=runs.bound,
            **finding,
        )


def _place(subject: Subject, trial: Trial) -> Where | None:
    """The first module, in execution order, whose output has more error than its inputs and rounding explain."""
    fine = precision(subject).dtype
    twin = _twin(subject, trial, fine)
    with torch.no_grad(), recorded(twin) as exact, Promoted(fine):
        subject.logits(twin, trial.tokens, trial.mask)
    with recorded(twin) as naive, naively(twin, trial.dtype), Promoted(fine):
        subject.logits(twin, trial.tokens, trial.mask)
    model = _twin(subject, trial, trial.stored)
    autocast = torch.autocast(subject.device.type, dtype=trial.dtype, enabled=trial.autocast)
    with torch.no_grad(), recorded(model) as own, autocast:
        subject.logits(model, trial.tokens, trial.mask)
    others = [{(call.module, call.nth): call for call in calls} for calls in (exact, naive)]
    for call in own:
        truth, rounded = (calls.get((call.module, call.nth)) for calls in others)
        if truth is not None and rounded is not None and _worse(call, truth, rounded, trial.dtype):
            return locate(model, call.module)
    return None


def _worse(own: Call, exact: Call, naive: Call, dtype: torch.dtype) -> bool:
    def off(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> bool:
        for x, y, z in zip(a, b, c, strict=False):
            if x.shape == y.shape == z.shape and x.numel():
                error, least = ((t.double() - y.double()).pow(2).mean().sqrt() for t in (x, z))
                floor = torch.finfo(dtype).eps * y.double().pow(2).mean().sqrt()
                if not error <= TIMES[dtype] * least + 2 * floor:
                    return True
        return False

    return off(own.outputs, exact.outputs, naive.outputs) and not off(own.inputs, exact.inputs, naive.inputs)


def _tokens(subject: Subject, B: int, T: int) -> Tensor:
    return subject.tokens(B, T, seed=subject.seed)


def _varied(subject: Subject, **sizes: int) -> dict[str, int]:
    """Those of the sizes that the subject can be built with."""
    return {name: value for name, value in sizes.items() if subject.can_vary(name)}


@needs(*READABLE, REPEATS)
def check_float32_keeps_its_digits(subject: Subject) -> None:
    """In float32, the logits must equal those of float64 up to the rounding of float32."""
    tokens = _tokens(subject, 3, subject.sizes.block_size)
    trial = Trial("the model in float32", torch.float32, tokens)
    runs, place = _runs(subject, trial), partial(_place, subject, trial)
    if not runs.error <= runs.bound:
        with Casts() as casts:
            subject.logits(subject.build(seed=subject.seed), tokens)
        if casts.autocast:
            raise NotApplicable("the forward turns on autocast itself")
        activations = [cast.line for cast in casts.seen if cast.activation]
        if casts.seen and not activations:
            lines = ", ".join(sorted({f"{cast.line.file}:{cast.line.line}" for cast in casts.seen if cast.line}))
            advise(f"constants are rounded to {_name(casts.seen[0].to)} ({lines}), which costs {runs.error:.2g}")
            return
        place = partial(next, iter(activations), None) if activations else place
    _judge(
        runs,
        trial,
        where=place,
        likely=("downcast-inside", "mask-added-and-subtracted"),
        advice="Look for .half(), .bfloat16() and .to(dtype) in the forward, and for a large number that is added and "
        "subtracted again.",
    )


@needs(*READABLE, REPEATS)
def check_bfloat16_stays_close(subject: Subject) -> None:
    """In bfloat16, the error must not exceed what rounding costs, also with padding and in wide layers."""
    trials = _short_trials(subject, torch.bfloat16)
    if subject.can_vary("n_embd"):
        few = _tokens(subject, 1, min(subject.sizes.block_size, 8))
        sizes = _varied(subject, n_embd=WIDE, n_layer=1)
        trials.append(Trial(f"a model of width {WIDE} in bfloat16", torch.bfloat16, few, sizes=sizes))
    for trial in trials:
        _judge(
            _runs(subject, trial),
            trial,
            where=partial(_place, subject, trial),
            likely=("rms-in-half-precision",),
            advice="Compute sums of many terms (a norm's mean square, a softmax) in float32: start with x.float() and "
            "convert back at the end.",
        )


@needs(*READABLE, REPEATS)
def check_float16_stays_close(subject: Subject) -> None:
    """In float16, the error must not exceed what rounding costs, also with padding."""
    if slow := subject.too_slow_in(torch.float16):
        raise NotApplicable(f"{slow}; it runs with --device or --gpu")
    for trial in _short_trials(subject, torch.float16):
        _judge(
            _runs(subject, trial),
            trial,
            where=partial(_place, subject, trial),
            likely=("fp16-mask-overflow",),
            advice="Fill masks with -inf or torch.finfo(dtype).min, by masked_fill or where: float16 ends at 65504.",
        )


def _short_trials(subject: Subject, dtype: torch.dtype) -> list[Trial]:
    T, name = subject.sizes.block_size, f"the model in {_name(dtype)}"
    tokens = _tokens(subject, 3, T)
    trials = [Trial(name, dtype, tokens)]
    if subject.takes_mask and T > 7:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, -3:] = False
        mask[-1, :4] = False
        trials.append(Trial(f"{name}, with a padding mask,", dtype, tokens, mask))
    return trials


@needs(*READABLE, REPEATS, "check_numerics.check_bfloat16_stays_close")
def check_long_sequences_stay_close(subject: Subject) -> None:
    """On long sequences, in bfloat16 and under autocast, the error must not exceed what rounding costs."""
    # wide heads, which have many rotary angles
    sizes = _varied(subject, block_size=LONG, n_layer=1, n_embd=4 * subject.sizes.n_embd)
    tokens = _tokens(subject, 1, min(sizes.get("block_size", subject.sizes.block_size), LONG))
    T = tokens.shape[1]
    converted = Trial(f"a sequence of {T} tokens in bfloat16", torch.bfloat16, tokens, scheme=SHARP, sizes=sizes)
    trials = [converted, replace(converted, what=f"a sequence of {T} tokens under autocast to bfloat16", autocast=True)]
    refused = []
    for trial in trials:
        try:
            runs = _runs(subject, trial)
        except NotApplicable as reason:
            refused.append(reason)
            continue
        if not runs.error <= runs.bound and _caused_by_buffers(subject, trial):
            advise(
                f"{trial.what} has {runs.error / runs.unavoidable:.3g} times the error that rounding costs, because "
                "converting the model also rounds its buffers. Keep inverse frequencies in float32"
            )
            continue
        _judge(
            runs,
            trial,
            where=partial(_place, subject, trial),
            likely=("rope-half-precision", "rope-angles-by-matmul"),
            advice="Compute angles in float32 and outside autocast: bfloat16 cannot tell position 256 from 257.",
        )
    if len(refused) == len(trials):
        raise refused[0]


def _caused_by_buffers(subject: Subject, trial: Trial) -> bool:
    """Whether the error is small if only weights are converted. Libraries do that, so the model is not to blame."""
    try:
        runs = _runs(subject, trial, buffers=False)
    except NotApplicable:
        return False
    return runs.error <= runs.bound


@needs(*READABLE, REPEATS)
def check_extreme_weights_give_finite_logits(subject: Subject) -> None:
    """With weights twenty times too large, the logits must still be finite."""
    model = subject.amplified(seed=subject.seed, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(EXTREME)
    tokens = _tokens(subject, 3, subject.sizes.block_size)
    with torch.no_grad(), recorded(model) as calls:
        logits = subject.logits(model, tokens)
    if bool(logits.isfinite().all()):
        return
    finite = [t[t.isfinite()].abs().max() for call in calls for t in call.outputs if bool(t.isfinite().any())]
    if max(map(float, finite), default=0.0) > 1e15:
        raise NotApplicable("this model does not bound its activations: they overflow float32")
    index = [int(i) for i in (~logits.isfinite()).nonzero()[0]]
    fail(
        f"with weights {EXTREME:g} times too large the logits are not finite, first at row {index[0]}, position "
        f"{index[1]}: one bad step in training would end in NaN",
        where=first_bad(model, partial(subject.logits, model, tokens), lambda t: not bool(t.isfinite().all())),
        likely=("softmax-without-maximum",),
        advice="Use torch.softmax, which subtracts the maximum, and do not divide by anything that can be 0.",
    )
