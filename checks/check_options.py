"""Options of the model: whatever it can be asked for beside sizes must change something."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .expect import STEADY, NotApplicable, advise, fail, needs, note
from .probes.influence import length
from .subject import EXISTENCE, Option, Reading, Subject, amplify
from .watch.calls import tensors
from .watch.draws import seeded

ROWS = 2
OF_THE_MODEL = re.compile(
    r"window|global|local|sliding|pattern|sink|rope|rotary|theta|freq|scal|factor|softcap|bias|gate|gated|(^|_)act|head|"
    r"kv|latent|expert|rout|residual|(^|_)tie|pos(ition)?s?(_|$|emb|enc)|alibi|mask|attn|attention|layer|ffn|mlp|norm|"
    r"eps|drop|mult|embed",
    re.IGNORECASE,
)


@needs(*STEADY)
def check_every_option_has_an_effect(subject: Subject) -> None:
    """Another value of a declared option must change something: the weights, or what the model returns in either mode.

    An option that changes nothing by itself is tried again with each of the other options changed.
    """
    if not subject.builds_afresh:
        raise NotApplicable("the model is one instance: it cannot be built with other options")
    if not subject.options:
        raise NotApplicable("nothing was found that the model takes beside sizes, or that must change its numbers")
    if subject.large:
        raise NotApplicable(f"to build a model of {subject.parameters:,} parameters for each option takes too long")
    plain = list(observed(subject, {}))
    idle = [option for option in subject.options if not changes(subject, option, {}, plain)]
    note(options=[option.name for option in subject.options], without_effect_alone=[option.name for option in idle])
    seen = {option: subject.reading(option.name, lambda: list(observed(subject, {}))) for option in idle}
    read = {option: reading for option, reading in seen.items() if reading is not None}
    told = {option: reading for option, reading in read.items() if not changes_beside_another(subject, option)}
    for option, reading in told.items():
        if not reading.computed and not OF_THE_MODEL.search(option.name):
            advise(f"the option {option.name} is declared at {place(reading)}, and no code was found that reads it")
    faults = [o for o, reading in told.items() if reading.computed or OF_THE_MODEL.search(o.name)]
    if faults:
        fail_idle(subject, faults[0], told[faults[0]], [option.name for option in faults[1:]])


def observed(subject: Subject, options: Mapping[str, Any]) -> Iterator[Tensor]:
    """Weights, then what the model returns and keeps in both modes, as initialized and with larger weights."""
    model = subject.build(seed=subject.seed, options=options)
    yield from [x.detach().clone() for x in (*model.parameters(), *model.buffers())]
    tokens = subject.tokens(ROWS, length(subject), seed=subject.seed)
    for scheme in EXISTENCE[:2]:
        if scheme is not None:
            amplify(model, *scheme, seed=subject.seed)
        for mode in (False, True):
            yield from returned(subject, model.train(mode), tokens)


def returned(subject: Subject, model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """The tensors that the model returns, and the numbers that its modules keep afterwards."""
    raw: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, result: raw.append(result))
    try:
        with torch.no_grad(), seeded(subject.seed):
            logits = subject.logits(model, tokens)
    finally:
        hook.remove()
    kept = [value for module in model.modules() for name, value in vars(module).items() if name[0] != "_"]
    return [logits, *tensors(raw), *(value for value in kept if isinstance(value, Tensor))]


def changes(subject: Subject, option: Option, others: Mapping[str, Any], plain: list[Tensor]) -> bool:
    """Whether another value of the option changes anything beside these values of others, or none can be tried."""
    accepted = 0
    for value in option.others:
        try:
            found = observed(subject, {**others, option.name: value})
            if not all(itertools.starmap(same, itertools.zip_longest(found, plain))):
                return True
            accepted += 1
        except Exception:  # whatever a foreign model raises for a value that it refuses
            continue
    return accepted < min(2, len(option.others))


def changes_beside_another(subject: Subject, option: Option) -> bool:
    """Whether it has an effect while another option has another value, which may switch on what this one is about."""
    for other in subject.options:
        for value in other.others if other is not option else ():
            try:
                plain = list(observed(subject, {other.name: value}))
            except Exception:  # whatever a foreign model raises for an unusual value
                continue
            if changes(subject, option, {other.name: value}, plain):
                return True
    return False


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def place(reading: Reading) -> str:
    return f"{reading.where.file}:{reading.where.line}" if reading.where is not None else "the model's configuration"


def fail_idle(subject: Subject, option: Option, reading: Reading, alike: list[str]) -> None:
    tried = ", ".join(f"{value:g}" if isinstance(value, float) else repr(value) for value in option.others[:3])
    others = len(subject.options) - 1
    beside = f", also with each of the {others} other options changed" if others else ""
    read = "the model computes with it, but no result depends on it" if reading.computed else "no code reads it"
    fail(
        f"the option {option.name} ({option.value!r}) has no effect: with {tried} instead, all weights and logits "
        f"stay the same bit for bit, in evaluation and in training mode{beside}; {read}"
        + (f". The same holds for {', '.join(alike)}" if alike else ""),
        where=reading.where,
        likely=("option-computed-and-dropped" if reading.computed else "option-never-read",),
        advice=f"Use {option.name}, or what is computed with it, where it is meant to act; or remove it.",
        option=option.name,
        tried=list(map(str, option.others)),
    )
