"""Whether a crash inside a check comes from what the check chose: the call is tried again without that.

A crash that the plain call shares is the model's own, and so is one under what the model declares: padding, a cache,
targets, its training mode, any batch and length.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..meet import vocabulary
from ..meet.vocabulary import squash
from ..subject import Subject

SAID = (ValueError, NotImplementedError, AssertionError)  # of what is refused on purpose
SHORT = 3  # letters of a name that other words may contain
DECLARED = vocabulary.CACHES | vocabulary.TARGETS


@dataclass(frozen=True)
class Call:
    """A call of a whole model that did not return."""

    model: nn.Module
    tokens: Tensor
    given: dict[str, Any]  # by name


def explained(error: Exception, subject: Subject) -> str:
    """Why a crash is not held against the model, naming what was handed; "" where it is."""
    try:
        call = _call_in(error)
        return "" if call is None else _left_out(call, error, subject) or _refused(call, error, subject)
    except Exception:  # what tries to explain must not hide the crash
        return ""


def _call_in(error: Exception) -> Call | None:
    """The outermost call of a module on token ids that the error came through."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        held = frame.f_locals
        if frame.f_code is nn.Module._call_impl.__code__ and isinstance(held.get("self"), nn.Module):
            args, given = held.get("args", ()), held.get("kwargs", {})
            tokens = args[0] if args else next(iter(given.values()), None)
            if len(args) == 1 and isinstance(tokens, Tensor) and tokens.dtype == torch.int64:
                return Call(held["self"], tokens, dict(given))
        trace = trace.tb_next
    return None


def _left_out(call: Call, error: Exception, subject: Subject) -> str:
    """A call without what the model is given wherever else it is called: a switch for its cache, positions."""
    beside = subject.beside(call.model, call.tokens)
    missing = [name for name in beside if name not in call.given]
    if not missing or not _works(lambda: call.model(call.tokens, **{**beside, **call.given})):
        return ""
    return f"the model was called without {', '.join(missing)}, with which it works: {type(error).__name__}: {error}"


def _refused(call: Call, error: Exception, subject: Subject) -> str:
    """A refusal in words that names an argument or an option of our choice, where the model works without."""
    if not isinstance(error, SAID):
        return ""
    masks = {form.argument for form in subject.mask_forms}
    beside = subject.beside(call.model, call.tokens)
    handed = {
        name: "" for name in call.given if name not in masks | set(beside) and squash(name) not in DECLARED
    } | {name: f"={value}" for name, value in subject.chosen.items()}  # fmt: skip
    named = [f"{name}{value}" for name, value in handed.items() if _names(str(error), name)]

    def plainly() -> None:
        model = subject.build(seed=subject.seed).train(call.model.training)
        subject.logits(model, call.tokens)

    if not named or not _works(plainly):
        return ""
    return f"the model refuses {', '.join(named)}: {type(error).__name__}: {error}"


def _names(text: str, name: str) -> bool:
    """Whether a text speaks of an argument: `dropout` in "attention_dropout > 0", a short one as a word of its own."""
    return squash(name) in squash(text) if len(name) > SHORT else bool(re.search(rf"\b{re.escape(name)}\b", text))


def _works(call: Callable[[], Any]) -> bool:
    try:
        with torch.no_grad():
            call()
    except Exception:
        return False
    return True
