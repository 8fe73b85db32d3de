"""Arguments for a function of the user's: each parameter has a role by its name, each role a value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..expect import NotApplicable, advise
from ..meet.vocabulary import squash
from ..subject import Companion, Subject

Names = Mapping[str, str]  # a role to the names of its parameters


def roles_of(function: Callable[..., Any], names: Names) -> dict[str, str]:
    """The role of each parameter, "" where its name has none. Raises NotApplicable where there is no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise NotApplicable("its signature cannot be read") from None
    roles = {squash(word): role for role, words in names.items() for word in words.split()}
    plain = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {name: roles.get(squash(name), "") for name in plain}


def filled(function: Callable[..., Any], roles: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments: every value whose role a parameter has. Raises NotApplicable for a required parameter without."""
    parameters, given = inspect.signature(function).parameters, {}
    for name, role in roles.items():
        if role in values:
            given[name] = values[role]
        elif parameters[name].default is inspect.Parameter.empty:
            raise NotApplicable(f"it has a required parameter {name!r} that no check knows how to fill")
    return given


def called(function: Callable[..., Any], roles: Mapping[str, str], values: Mapping[str, Any]) -> Any:
    given = filled(function, roles, values)
    kinds = inspect.signature(function).parameters
    first = [given.pop(name) for name in list(given) if kinds[name].kind is inspect.Parameter.POSITIONAL_ONLY]
    return function(*first, **given)


def judged(subject: Subject, *kinds: str, judge: Callable[[Companion], Any]) -> dict[str, Any]:
    """What `judge` gives for each companion of these kinds; advice names those that it raises NotApplicable for.

    Raises NotApplicable where there is none, or none that it can judge.
    """
    seen, missed = {}, {}
    for companion in subject.companions(*kinds):
        try:
            seen[companion.name] = judge(companion)
        except NotApplicable as reason:
            missed[companion.name] = reason.reason
    said = [f"{name} was found in your file but not checked: {why}" for name, why in missed.items()]
    if not seen:
        raise NotApplicable("; ".join(said))
    for one in said:
        advise(one)
    return seen
