"""Attention in any architecture: the scale of its scores against the widths that the model has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .expect import CAUSAL, STEADY, NotApplicable, fail, needs, note
from .probes.influence import call, length
from .probes.precision import precise
from .probes.windows import is_size
from .subject import EXISTENCE, Subject
from .watch.scales import ScoreScale, ScoreScales

SAME = 1e-4  # relative, between 1 / factor² and a width: in float32 it is off by 1e-6
ROWS = 2


@needs(*STEADY, CAUSAL)
def check_scores_are_scaled_by_their_own_width(subject: Subject) -> None:
    """Attention scores must not be divided by the root of a width that is not that of the queries and keys multiplied.

    Another factor (none, 1/D, a learned one) may be a design. The root of another width is judged: that of the model,
    of a latent, of a matrix, of a part of the key. In a model of another size it must be the root of the same, which is
    no coincidence then.
    """
    here = scales(subject)
    note(factors=sorted({scale.factor for scale in here[1]}), head_width=here[1][0].head_width)
    if part := part_taken(subject, here[1]):
        fail_scale(here[1][0], *part)
    roots = widths_taken(*here)
    if not roots:
        return
    other = {"n_embd": 2 * subject.sizes.n_embd, "n_head": max(subject.sizes.n_head // 2, 1)}
    varied = next(({name: other[name]} for name in other if subject.can_vary(name)), None)
    if varied is None:
        raise NotApplicable("the scale is the root of another width, which may be a coincidence in a model of one size")
    again = roots.keys() & widths_taken(*scales(subject, **varied)).keys()
    if again:
        which = sorted(again)[0]
        fail_scale(here[1][0], which, roots[which], ("scale-by-d-model",))


def scales(subject: Subject, **sizes: Any) -> tuple[nn.Module, list[ScoreScale]]:
    """The model, and the factors of its attentions, all of one head width. Raises NotApplicable if none is seen."""
    model, T = precise(subject, EXISTENCE[1], **sizes), length(subject)
    with torch.no_grad(), ScoreScales(model, T) as seen:
        call(subject, model, subject.tokens(ROWS, T, seed=subject.seed))
    if not seen.found:
        raise NotApplicable("no scores were seen that are products of queries and keys times one factor")
    return model, seen.found


def widths_taken(model: nn.Module, found: list[ScoreScale]) -> dict[str, int]:
    """The matrices in the first attention one of whose widths is the one by whose root all scores are divided.

    None of them if it is the head width or its square (1/D, as in maximal update parametrization).
    """
    first, width = found[0], unusual_width(found)
    if width is None or first.where is None:
        return {}
    attention = dict(model.named_modules()).get(first.where.module)
    matrices = [] if attention is None else [(n, p) for n, p in attention.named_parameters() if p.dim() == 2]
    return {
        f"{side} width of {name.removesuffix('.weight')}": n
        for name, matrix in matrices
        for side, n in zip(("output", "input"), matrix.shape, strict=True)
        if abs(width / n - 1) <= SAME
    }


def unusual_width(found: list[ScoreScale]) -> float | None:
    """By whose root all scores are divided, if it is neither the head width nor its square (1/D, as in muP)."""
    first = found[0]
    if not 0 < first.factor < 1 or any(abs(scale.factor / first.factor - 1) > SAME for scale in found):
        return None
    width = first.factor**-2
    return None if any(abs(width / usual - 1) <= SAME for usual in (first.head_width, first.head_width**2)) else width


def part_taken(subject: Subject, found: list[ScoreScale]) -> tuple[str, int] | None:
    """The option, with its value, that is one part of the head width and by whose root alone scores are divided.

    Both follow when it has another value; an option that says what to divide by is no part of the width.
    """
    width = unusual_width(found)
    parts = [o for o in subject.options if is_size(o.value) and width is not None and abs(width / o.value - 1) <= SAME]
    for part in parts if subject.builds_afresh else ():
        for other in (value for value in part.others if is_size(value)):
            try:
                there = scales(subject, options={part.name: other})[1]
            except Exception:  # whatever a foreign model raises for a value that it refuses
                continue
            wider, taken = there[0].head_width != found[0].head_width, unusual_width(there)
            if wider and taken is not None and abs(taken / other - 1) <= SAME:
                return part.name, part.value
            break
    return None


def fail_scale(scale: ScoreScale, which: str, n: int, likely: tuple[str, ...] = ()) -> None:
    D = scale.head_width
    fail(
        f"attention scores are multiplied by {scale.factor:.4g} = 1/√{n}, where {n} is the {which}, but the queries "
        f"and keys that are multiplied have width {D}: should be 1/√{D} = {D**-0.5:.4g}",
        where=scale.where,
        likely=likely,
        advice="Divide by the root of the width of a head's key, rotated and other features together: "
        "q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5.",
        factor=scale.factor,
        head_width=D,
        width=n,
    )
