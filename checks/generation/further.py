"""The further functions of a file that generate: beam_search, sample, generate_text, … beside its generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..expect import CheckFailed, NotApplicable
from ..subject import Companion, Subject
from .scripted import Stage, stage

KIND = "generation"


def further(subject: Subject) -> list[Companion]:
    try:
        return subject.companions(KIND)
    except NotApplicable:
        return []


def on_each(subject: Subject, judge: Callable[[Stage], Any]) -> None:
    """Judges the subject's generate and every further function. Raises a NotApplicable if all do."""
    reasons: list[NotApplicable] = []
    every = [None, *further(subject)]
    for one in every:
        try:
            with told_of(one):
                judge(stage(subject, one))
        except NotApplicable as reason:
            reasons.append(reason)
    if len(reasons) == len(every):
        there = reasons if subject.generates else reasons[1:]
        raise (there or reasons)[0]


@contextmanager
def told_of(one: Companion | None) -> Iterator[None]:
    """A finding about a further function names it first, and its line."""
    try:
        yield
    except CheckFailed as failed:
        if one is None:
            raise
        finding = failed.finding
        raise CheckFailed(
            replace(finding, says=f"{one.name}: {finding.says}", where=finding.where or one.where)
        ) from None
