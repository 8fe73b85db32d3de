"""A declared architecture is an exact oracle: the reference with the subject's own weights must give its numbers.

`--spec gpt2` and `--spec llama` declare; by default the family and variant that fit are reported, and nothing fails.
"""

from __future__ import annotations

from typing import Any

from checks.expect import NotApplicable, advise, fail, note
from checks.spec.settling import FAMILIES, Settled, settled
from checks.spec.stages import Explained, explain, part_from
from checks.spec.trace import Parting

NAMES = {"gpt2": "GPT-2", "llama": "Llama"}
SIMULATION_SECONDS = 5.0
CONTRACT = ("check_contract.check_logits_have_shape",)


def declared(subject: Any) -> str | None:
    """The architecture that the user, or the subject itself, declares; None for "auto"."""
    asked = getattr(subject, "spec", None)
    return asked if asked in FAMILIES else subject.declared("spec")


def check_logits_agree(subject: Any) -> None:
    """On the same weights the logits are those of the declared architecture."""
    family = declared(subject)
    if family is None:
        return report(subject)
    found = settled(subject, family)
    if found.agrees:
        return agreed(found)
    if found.why_not:
        fail(f"this is no {NAMES[family]}: {found.why_not}", family=family)
    differ(found, explain(found, SIMULATION_SECONDS))


def report(subject: Any) -> None:
    """Which family and variant fits, without a declaration: advice at most."""
    results = [settled(subject, family) for family in FAMILIES]
    for found in results:
        if found.agrees:
            agreed(found)
            advise(f"this is a {NAMES[found.family]} ({found.variant}): the reference gives the same logits")
            return
    note(why_not={found.family: found.why_not for found in results if found.why_not})
    for found in results:
        why = explain(found, SIMULATION_SECONDS / 2) if found.plan is not None else None
        if why is not None and why.ids:
            name = NAMES[found.family]
            advise(
                f"this gives exactly what a {name} ({why.variant}) gives with {named(why)}: {says(why)}; "
                f"a bug if a {name} was meant, else a design of its own"
            )
            return
    raise NotApplicable("the weights give neither a GPT-2's nor a Llama's logits, and no architecture is declared",
                        why={f.family: f.why_not or f"logits differ by {f.error:.2g}" for f in results})  # fmt: skip


def agreed(found: Settled) -> None:
    assert found.plan is not None and found.variant is not None
    note(family=found.family, variant=found.variant.words(), tied=found.plan.tied, key_value_heads=found.plan.n_kv_head,
         error=found.error, bound=found.specimen.bound.size)  # fmt: skip


def says(why: Explained) -> str:
    groups = [why.ties] if why.ties else why.together
    return "; and ".join(" or, which is the same here, ".join(one.bug.says for one in group) for group in groups)


def differ(found: Settled, why: Explained | None) -> None:
    """Ends as failed, with the first part that differs and the known bug that gives these numbers."""
    name = NAMES[found.family]
    head = f"on the same weights the logits are not a {name}'s: they differ by {found.error:.3g} of the largest"
    place = part_from(found, why.plan, why.variant) if why is not None else None
    if why is not None and why.ids:
        head += f"; they equal a {name}'s with {named(why)} exactly: {says(why)}"
    else:
        head += "; no known bug gives these numbers"
        head += "" if why is None or why.complete else f" (the {SIMULATION_SECONDS:g} s for trying them were over)"
    head += f". {sentence(place)}" if place is not None else ""
    fail(
        head,
        where=place.where if place else None,
        likely=tuple(why.ids) if why else (),
        family=found.family,
        error=found.error,
        variant=why.variant.words() if why else [],
        stages=why.parts if why else [],
        first_part_that_differs=place.differs if place else None,
    )


def named(why: Explained) -> str:
    """`a` or `b` (ties), and `c`."""
    groups = [why.ties] if why.ties else why.together
    return " and ".join(" or ".join(f"`{one.bug.id}`" for one in group) for group in groups)


def sentence(place: Parting) -> str:
    text = str(place)
    return text[0].upper() + text[1:]
