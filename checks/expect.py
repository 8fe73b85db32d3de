"""What a check says: comparisons that explain themselves, and the ways a check can end.

`CheckFailed` carries a finding, `NotApplicable` a reason; `advise` and `note` add to the verdict without failing it.
`drawn` lets Hypothesis search a structure; the only place with Hypothesis settings.
"""

from __future__ import annotations

import functools
import inspect
import time
import unittest
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from .report.paths import shown as shown  # for whoever names a file in a finding

LARGE = 2**18  # numbers of a tensor
LOGITS_AXES = ("row", "position", "symbol")


@dataclass(frozen=True)
class Where:
    """A place in the subject: a module by its dotted name, its class, and the file and line of its forward."""

    module: str
    type: str = ""
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        place = f", {self.file}:{self.line}" if self.file else ""
        return f"{self.module} ({self.type}{place})" if self.type else self.module


@dataclass(frozen=True)
class Finding:
    """The explanation inside a failing verdict."""

    says: str  # what broke, with numbers
    evidence: dict[str, Any] = field(default_factory=dict)  # plain data: goes to JSON
    where: Where | None = None
    likely: tuple[str, ...] = ()  # ids of known bugs, most likely first
    advice: str = ""  # what to try
    example: dict[str, Any] = field(default_factory=dict)  # the smallest drawn case that fails


class CheckFailed(AssertionError):
    """The subject breaks the rule; `finding` explains."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.says)
        self.finding = finding


class NotApplicable(unittest.SkipTest):
    """The check cannot decide about this subject; `evidence` is what was seen, its `unless` what would change that."""

    def __init__(self, reason: str, **evidence: Any) -> None:
        super().__init__(reason)
        self.reason, self.evidence = reason, evidence


class TooSlow(BaseException):
    """The model is too slow for this check; `evidence` is what it took. A verdict says that it is not applicable.

    No Exception: checks take those as refusals of the model.
    """

    def __init__(self, took: str, **evidence: Any) -> None:
        super().__init__(f"the model is too slow for this check: {took}")
        self.evidence = evidence


def fail(
    says: str,
    *,
    advice: str,
    where: Where | None = None,
    likely: Sequence[str] = (),
    **evidence: Any,
) -> NoReturn:
    """Ends the check as failed. `says` has the numbers, `advice` what to try; `likely` names known bugs, by rank."""
    raise CheckFailed(Finding(says, evidence, where, tuple(likely), advice))


@dataclass
class Remarks:
    """What the running check adds to its verdict, whatever its outcome."""

    advice: list[str] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


_remarks: ContextVar[Remarks | None] = ContextVar("remarks", default=None)


@contextmanager
def remarks() -> Iterator[Remarks]:
    """Collects what the checks called inside say with `advise` and `note`."""
    mine = Remarks()
    token = _remarks.set(mine)
    try:
        yield mine
    finally:
        _remarks.reset(token)


def advise(text: str) -> None:
    """A remark that fails nothing: a legitimate but unusual choice, a convention, something slow."""
    mine = _remarks.get()
    if mine is not None and text not in mine.advice:
        mine.advice.append(text)


def note(**evidence: Any) -> None:
    """Evidence for the verdict, also of a check that passes: margins, maps, what was tried. Plain data only."""
    mine = _remarks.get()
    if mine is not None:
        mine.evidence.update(evidence)


def keep(**objects: Any) -> None:
    """Leaves objects (a trained model, a curve) for whoever runs the check; they are no part of the verdict's data."""
    mine = _remarks.get()
    if mine is not None:
        mine.kept.update(objects)


@dataclass(frozen=True)
class Bound:
    """How far two numbers may be apart, and why."""

    size: float
    because: str

    def __str__(self) -> str:
        return f"{self.size:.1e} ({self.because})" if self.size else f"exactly 0 ({self.because})"


EQUAL_SHAPE = Bound(0.0, "the same arithmetic on the same shapes gives the same bits")


def farthest(got: Tensor, want: Tensor) -> float:
    """The largest absolute difference; infinite where only one side is NaN or they differ in infinities."""
    if _identical(got, want):
        return 0.0
    return float(_distance(got, want).max()) if got.numel() else 0.0


def _identical(got: Tensor, want: Tensor) -> bool:
    """Whether two large tensors hold the same numbers, which takes no copies; False where that is not clear."""
    return got.numel() > LARGE and (got.dtype, got.device) == (want.dtype, want.device) and torch.equal(got, want)


def _distance(got: Tensor, want: Tensor) -> Tensor:
    both = torch.promote_types(got.dtype, want.dtype)
    got, want = got.detach().to(both), want.detach().to(device=got.device, dtype=both)
    if not both.is_floating_point:
        return (got != want).double()
    apart = (got - want).abs().double()
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, apart.nan_to_num(nan=torch.inf, posinf=torch.inf))


def first_offence(got: Tensor, want: Tensor, bound: float) -> tuple[int, ...] | None:
    """The first index, in reading order, at which the two are farther apart than the bound; None if nowhere."""
    if _identical(got, want):
        return None
    offences = (_distance(got, want) > bound).nonzero()
    return tuple(int(i) for i in offences[0]) if len(offences) else None


def place(index: Sequence[int], axes: Sequence[str]) -> str:
    """`row 0, position 3, logit 11`; `index [2, 5]` in a parameter."""
    if all(axis.startswith("index ") for axis in axes):
        return f"index {list(index)}"
    named = ("logit" if axis == "symbol" else axis for axis in axes)
    return ", ".join(f"{axis} {i}" for axis, i in zip(named, index, strict=False))


def expect_close(
    got: Tensor,
    want: Tensor,
    *,
    bound: Bound,
    says: str,
    advice: str,
    axes: Sequence[str] = LOGITS_AXES,
    where: Callable[[], Where | None] | None = None,
    likely: Sequence[str] = (),
    **evidence: Any,
) -> float:
    """Fails unless every entry of `got` is within the bound of `want`. Returns the largest difference.

    `says` is the rule that would be broken ("a later token changed an earlier logit"); `where` is called only on
    failure, to find the module.
    """
    if got.shape != want.shape:
        fail(f"{says}: shapes {tuple(got.shape)} and {tuple(want.shape)}", likely=likely, advice=advice, **evidence)
    index = first_offence(got, want, bound.size)
    largest = farthest(got, want)
    if index is None:
        return largest
    size = f"largest difference {largest:.3g}, " if got.is_floating_point() else ""
    fail(
        f"{says}: first at {place(index, axes)}: {_number(got[index])} against {_number(want[index])}; "
        f"{size}allowed {bound}",
        where=where() if where else None,
        likely=likely,
        advice=advice,
        **{"first": dict(zip(axes, index, strict=False)), "difference": largest, "bound": bound.size, **evidence},
    )


def expect_same(got: Tensor, want: Tensor, *, says: str, advice: str, **finding: Any) -> None:
    """Fails unless the two are bit for bit the same (NaN equals NaN)."""
    expect_close(got, want, bound=finding.pop("bound", EQUAL_SHAPE), says=says, advice=advice, **finding)


def expect_differs(
    got: Tensor, want: Tensor, *, above: float, because: str, says: str, advice: str, **finding: Any
) -> float:
    """Fails unless some entry differs by more than `above`: the guard against a vacuous check.

    Returns the largest difference.
    """
    largest = farthest(got, want)
    if not largest > above:
        finding.setdefault("difference", largest)
        fail(
            f"{says}: largest difference {largest:.3g}, expected more than {above:.1e} ({because})",
            advice=advice,
            **finding,
        )
    return largest


def _number(value: Tensor) -> str:
    return f"{value.item():.6g}"


# What other checks need, by the ids of checks.
SHAPE = "check_contract.check_logits_have_shape"
READABLE = (SHAPE, "check_contract.check_logits_are_finite")
REPEATS = "check_modes.check_eval_repeats_itself"
STEADY = (
    SHAPE,
    "check_contract.check_every_length_is_read",
    "check_contract.check_logits_are_finite",
    "check_contract.check_earlier_calls_leave_no_trace",
    REPEATS,
)
CAUSAL = "check_causality.check_future_cannot_change_past"
REACHES = "check_causality.check_past_reaches_every_later_position"
ROWS_APART = "check_masking.check_rows_do_not_touch"
READ_ALONE = (
    CAUSAL,
    "check_causality.check_prefix_gives_the_same_logits",
    ROWS_APART,
)  # alone as in a batch, part as whole
GRADIENTS = "check_gradients.check_every_parameter_gets_a_gradient"
FOLLOWS = "check_training.check_a_step_follows_the_gradient"
APPENDS = "check_generation.check_generate_appends_tokens"
GREEDY = "check_generation.check_greedy_equals_the_naive_loop"


Check = TypeVar("Check", bound=Callable[..., None])


def needs(*prerequisites: str) -> Callable[[Check], Check]:
    """Names the checks (`check_contract.check_logits_have_shape`) without which this one's verdict would mislead."""

    def mark(check: Check) -> Check:
        check.needs = prerequisites  # type: ignore[attr-defined]
        return check

    return mark


def slow(reason: str) -> Callable[[Check], Check]:
    """Keeps a check out of the default run; `reason` says what takes long. `--slow` runs it."""

    def mark(check: Check) -> Check:
        check.slow = reason  # type: ignore[attr-defined]
        return check

    return mark


Drawn = Any  # a Hypothesis strategy, or a function from the subject to one

EXAMPLES = 20
CASE, FEWEST = 64, 5  # tokens that a case is taken to read, and cases of a model so large that not all are affordable
SHRINKING_SECONDS = 2.0


def drawn(
    *, examples: int = EXAMPLES, when: Callable[[Any], None] | None = None, **strategies: Drawn
) -> Callable[[Callable[..., None]], Callable[[Any], None]]:
    """A check whose other arguments are drawn: `@drawn(t=lambda subject: integers(1, subject.sizes.block_size))`.

    `when(subject)` runs before the first draw and may raise NotApplicable. The smallest failing case becomes the
    finding's example.
    """

    def decorate(check: Callable[..., None]) -> Callable[[Any], None]:
        @functools.wraps(check)
        def run(subject: Any) -> None:
            if when is not None:
                when(subject)
            _search(check, subject, strategies, subject.affordable(CASE, examples, least=FEWEST, sweeps=2))

        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("subject", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        )
        del run.__wrapped__  # pytest would ask for the drawn arguments as fixtures
        return run

    return decorate


def _search(check: Callable[..., None], subject: Any, strategies: dict[str, Drawn], examples: int) -> None:
    import hypothesis
    from hypothesis import HealthCheck, Phase

    failures: dict[str, BaseException] = {}
    started: list[float] = []

    def body(**values: Any) -> None:
        # Shrinking is bounded: when its time is over, only cases already known to fail still fail.
        key = repr(sorted(values.items()))
        if key in failures:
            raise failures[key]
        if started and time.monotonic() - started[0] > SHRINKING_SECONDS:
            return
        try:
            check(subject, **values)
        except CheckFailed as failure:
            started.append(time.monotonic())
            failures[key] = CheckFailed(replace(failure.finding, example=values))
            raise failures[key] from None
        except TooSlow:
            if not failures:
                raise

    chosen = {name: s(subject) if callable(s) else s for name, s in strategies.items()}
    search = hypothesis.seed(subject.seed)(hypothesis.given(**chosen)(body))
    hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )(search)()
