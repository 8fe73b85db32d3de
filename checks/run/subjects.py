"""From what a user names to the subject: the reference, one of its known bugs, or foreign code."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from typing import Any

from ..expect import NotApplicable
from ..meet.errors import UsageError
from ..subject import Subject
from . import REFERENCE


def subject_of(
    what: Any = REFERENCE,
    *,
    parts: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    causal: bool = True,
    checkpoint: str | None = None,
    spec: str = "auto",
) -> Subject:
    """The subject behind `FILE.py[:NAME]`, `NOTEBOOK.ipynb[:NAME]`, `package.module:NAME`, `bug:ID` or an object.

    `parts` are what lives elsewhere, `{"loss": "train.py:masked_loss"}` or functions; `checkpoint` is a file of
    weights; `spec` is "gpt2", "llama", "auto", or with a table of weights "gpt2:FILE.json".
    Raises UsageError for whatever cannot be loaded or declared so, with what would settle it.
    """
    declared: dict[str, Any] = dict(seed=seed, device=device, causal=causal)
    if spec != "auto":
        from ..family.weights.table import declared_spec

        declared["spec"] = declared_spec(spec)
    if isinstance(what, str) and (what == REFERENCE or what.startswith("bug:")):
        subject = _own(what, parts, checkpoint, declared)
    else:
        from ..meet.foreign import foreign

        subject = foreign(what, parts=parts, checkpoint=checkpoint, **declared)
    if subject.spec.table:
        _fit(subject)
    return subject


def _own(what: str, parts: Mapping[str, Any] | None, checkpoint: str | None, declared: dict[str, Any]) -> Subject:
    """The reference, or one of its known bugs, with other parts if such are given."""
    from ..reference import reference

    if checkpoint is not None:
        raise UsageError(f"--checkpoint goes with a model of yours, not with {what}")
    subject = reference(**declared) if what == REFERENCE else _bug(what.removeprefix("bug:"), declared)
    if parts:
        from ..meet.parts import given_parts  # imported here because it takes a tenth of a second

        subject.parts.declares = {}  # what the reference says of its own parts holds for no others
        vars(subject.parts).update(given_parts(parts))
    return subject


def _bug(id: str, declared: Mapping[str, Any]) -> Subject:
    from ..bugs import all_bugs

    known = all_bugs()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=5) or sorted(known)[:5]
        raise UsageError(f"no bug is called {id!r}; among the {len(known)} known ones: {', '.join(near)}")
    return known[id].subject(**declared)


def _fit(subject: Subject) -> None:
    """Tries the table of weights on the model before anything runs. Raises UsageError if it does not fit."""
    from ..family.fit import fit_to

    with contextlib.suppress(NotApplicable):
        fit_to(subject, subject.spec.family)
