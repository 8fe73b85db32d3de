"""Running one check on one subject, and its verdict as data."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..expect import CheckFailed, NotApplicable, TooSlow, Where, remarks
from ..garbage import memory_given_back, old_objects_kept
from ..meet.process import limited_check
from ..subject import Subject, one_thread, unwarned
from . import NOTHING_TO_LEARN
from .crashes import explained
from .order import Check, check_id, checks_in, rule, theme

Outcome = Literal["passed", "failed", "error", "not_applicable", "skipped", "blocked"]
LEARNING = ("gradients", "optimizer")  # themes that are about parameters
STOPS_OTHERS = ("failed", "error", "blocked")
BACKWARD = "check_gradients.check_every_parameter_gets_a_gradient"  # reports a backward pass that fails


@dataclass
class Verdict:
    """One line of the report. `rule` is the check's sentence, `says` what happened."""

    check: str  # check_causality.check_future_cannot_change_past
    theme: str  # causality
    outcome: Outcome
    rule: str
    says: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    where: Where | None = None
    likely: tuple[str, ...] = ()
    advice: str = ""
    remarks: list[str] = field(default_factory=list)
    example: dict[str, Any] = field(default_factory=dict)
    reproduce: str = ""
    seconds: float = 0.0
    kept: dict[str, Any] = field(default_factory=dict)  # live objects for the caller

    def as_dict(self) -> dict[str, Any]:
        """Everything but the live objects."""
        return asdict(replace(self, kept={}))


@unwarned()
def judge(check: Check, subject: Subject, earlier: Mapping[str, Verdict]) -> Verdict:
    """Runs one check, unless one that it needs failed. Never raises for what the subject's code does.

    `earlier` holds the verdicts so far, by check id. KeyboardInterrupt passes through.
    """
    verdict = Verdict(check_id(check), theme(check), "passed", rule(check), reproduce=subject.reproduce(check))
    for name in getattr(check, "needs", ()):
        if name in earlier and earlier[name].outcome in STOPS_OTHERS:
            verdict.outcome, verdict.says = "blocked", f"needs {name}, which {earlier[name].outcome}"
            return verdict
    if verdict.theme in LEARNING and not subject.learns:
        verdict.outcome, verdict.says = "not_applicable", NOTHING_TO_LEARN
        return verdict
    start = time.perf_counter()
    large = not subject.builds_afresh and subject.large
    long = large or hasattr(check, "slow") or getattr(check, "sanity", False)
    with remarks() as mine, one_thread(), old_objects_kept(), limited_check(long=long):
        try:
            check(subject)
        except CheckFailed as failure:
            found = failure.finding
            verdict.outcome, verdict.says = "failed", found.says
            verdict.where = found.where or _last_own_line(failure.__context__, subject)
            verdict.evidence, verdict.likely = dict(found.evidence), found.likely
            verdict.advice, verdict.example = found.advice, found.example
        except NotApplicable as reason:
            verdict.outcome, verdict.says, verdict.evidence = "not_applicable", reason.reason, dict(reason.evidence)
        except TooSlow as reason:
            verdict.outcome, verdict.says, verdict.evidence = "not_applicable", str(reason), dict(reason.evidence)
        except Exception as error:
            if _wants_gradients(error) and not subject.learns:
                verdict.outcome, verdict.says = "not_applicable", NOTHING_TO_LEARN
                return verdict
            if _not_on_the_cpu(error, subject):
                verdict.outcome, verdict.says = "not_applicable", f"PyTorch cannot do this on the CPU: {error}"
                return verdict
            if verdict.check != BACKWARD and _backward_fails(error, subject):
                verdict.outcome, verdict.says = "blocked", f"needs {BACKWARD}, which failed: {error}"
                return verdict
            if ours := explained(error, subject):
                verdict.outcome, verdict.says = "not_applicable", ours
                return verdict
            verdict.outcome, verdict.says = "error", f"{type(error).__name__}: {error}"
            verdict.where = _last_own_line(error, subject)
    if subject.device.type == "meta" and verdict.outcome in ("failed", "error"):
        verdict.outcome = "not_applicable"
        verdict.says = f"the meta device computes nothing, so this says nothing about the model: {verdict.says}"
    verdict.seconds = round(time.perf_counter() - start, 4)
    verdict.evidence = {**mine.evidence, **verdict.evidence}
    verdict.remarks, verdict.kept = mine.advice, mine.kept
    if large and not verdict.kept:
        subject.leave()  # gradients and weights in float64 would fill the memory until another check needs the model
        memory_given_back()
    return verdict


def _wants_gradients(error: Exception) -> bool:
    """Whether torch reports that nothing can be differentiated, trained or saved."""
    says = ("does not require grad", "empty parameter list", "non-empty list of Tensors", "no parameter to train")
    return any(words in str(error) for words in says)


def _not_on_the_cpu(error: Exception, subject: Subject) -> bool:
    """Whether torch itself lacks this operation on the CPU."""
    if subject.device.type != "cpu" or not isinstance(error, NotImplementedError) or "CPU" not in str(error):
        return False
    return not subject.owns(traceback.extract_tb(error.__traceback__)[-1].filename)


def _backward_fails(error: Exception, subject: Subject) -> bool:
    """Whether a tensor needed by the backward pass was changed in place, in any backward pass of this model."""
    if "modified by an inplace operation" not in str(error):
        return False
    told = next(check for check in checks_in("gradients") if check_id(check) == BACKWARD)
    return judge(told, subject, {}).outcome == "failed"


def _last_own_line(error: BaseException | None, subject: Subject) -> Where | None:
    """The last line of the subject's own code that an exception went through."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    theirs = [frame for frame in frames if subject.owns(frame.filename)]
    return Where(theirs[-1].name, "", theirs[-1].filename, theirs[-1].lineno or 0) if theirs else None
