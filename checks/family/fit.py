"""Which family, plan and variant a subject is: built at telling sizes, mapped, and compared with the reference."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import note
from ..subject import Subject, one_thread
from .agreement import apart
from .closeness import nearest
from .norms import NormForm, measure
from .reference import USUAL_BASES, USUAL_EPS, USUAL_STRETCHES, Stretch, Variant, build, norms_of, variants
from .specimen import Settled, Specimen, specimen
from .weights.inventory import Weight
from .weights.planning import plans, unsettled
from .weights.roles import NoPlan, Plan
from .weights.table import shown, tabled

FAMILIES = ("gpt2", "llama")
LARGEST_EPS = 1e-4  # a norm's epsilon beyond this is no longer left open
FACTORS = ("factor", "rope_factor", "scale_factor", "rope_scale_factor", "scaling_factor")  # of stretched frequencies
ORIGINALS = ("original_max_position_embeddings", "original_context_length", "old_context_len", "original_max_seq_len")
FIRST = 16  # candidates that are tried before the choices are settled one by one
SECONDS = 1.5  # for mapping and agreement


def _settle(subject: Subject, family: str) -> Settled:
    return settle(specimen(subject), family)


def settled(subject: Subject, family: str) -> Settled:
    """How the subject compares with this family; found once."""
    found = subject.once(_settle, family)
    if found.plan is not None:
        note(weights=shown(found.plan))
        if not found.agrees and (open_ := unsettled(found.plan)):
            note(unsettled=open_)
    return found


def settle(seen: Specimen, family: str) -> Settled:
    """The plan and variant of the family that give the subject's logits; else those that come nearest by rank."""
    start = time.process_time()
    found = Settled(family, seen, seen.logits())
    table = seen.subject.spec.table
    try:
        candidates = list(tabled(seen.inventory, seen.shape, table) if table else plans(seen.inventory, seen.shape))
    except NoPlan as reason:
        found.why_not = str(reason)
        return found
    found.why_not = unlike(candidates[0], family)
    if found.why_not:
        return found
    with one_thread():
        grouped = candidates[0].n_kv_head != seen.shape.n_head
        ways = variants(family, _eps(seen, candidates[0]), _bases(seen), grouped, _stretches(seen))
        if bool((found.theirs.logsumexp(-1).abs() < 1e-9).all()):
            ways = [replace(way, log_probabilities=True) for way in ways]
        found.candidates = [(plan, way) for plan in candidates for way in ways]
        _try(found, found.candidates[:FIRST])
        if not found.agrees:
            _try(found, [(plan, variant) for plan, variant, _ in nearest(found)])
        if not found.agrees:
            _try(found, found.candidates[FIRST:], until=start + SECONDS)
    found.seconds = time.process_time() - start
    return found


def _try(found: Settled, candidates: list[tuple[Plan, Variant]], until: float = float("inf")) -> None:
    """Up to the first that agrees; the best is kept."""
    for plan, variant in candidates:
        if found.agrees or time.process_time() > until:
            return
        error = disagreement(found.specimen, plan, variant, found.theirs)
        found.tried += 1
        if found.error is None or error < found.error:
            found.plan, found.variant, found.error = plan, variant, error


def unlike(plan: Plan, family: str) -> str:
    """What of the weights cannot be this family's; "" if they can."""
    if family == "gpt2" and plan.positions is None and not plan.gated:
        T, C = plan.shape.block_size, plan.shape.n_embd
        return f"no position embedding is found: no weight outside the layers is a table [{T}, {C}], and no buffer"
    if family == "gpt2" and plan.gated:
        return "its feed-forward has a gate (three matrices), and GPT-2's has none"
    if family == "llama" and not plan.gated:
        return "its feed-forward has no gate, and Llama's has (SwiGLU, three matrices)"
    return ""


def disagreement(seen: Specimen, plan: Plan, variant: Variant, theirs: Tensor) -> float:
    """The largest difference of the logits, of the largest logit."""
    with torch.no_grad():
        ours = build(plan, variant)(seen.tokens)[..., : theirs.shape[-1]]
    return apart(theirs, ours.double())


def _eps(seen: Specimen, plan: Plan) -> list[tuple[float, ...]]:
    """The epsilons to try: those measured, else the usual ones."""
    forms = [norm_form(seen, plan, name) for name in norms_of(plan)]
    if all(form is not None for form in forms):
        eps = [form.eps if form.eps <= LARGEST_EPS else 1e-5 for form in forms if form is not None]
        return [tuple(eps)]
    return [(eps,) for eps in USUAL_EPS]


def norm_form(seen: Specimen, plan: Plan, name: str) -> NormForm | None:
    """The form of the first layer's norm of this name, or of the final one; None if it cannot be told."""
    norm = norms_of(plan)[name]
    if norm is None:
        return None
    layer = seen.inventory.layers[0]
    gain, bias = (w if w is None or isinstance(w, Weight) else layer[w] for w in (norm.gain, norm.bias))
    if gain is None:
        return None
    values = gain.tensor.detach() + (1.0 if norm.minus_one else 0.0)
    try:
        with torch.no_grad(), seen.running():
            return measure(gain.owner, values, None if bias is None else bias.tensor.detach(), values)
    except Exception:  # the owner of the gain is no norm that can be called alone
        return None


def _numbers(seen: Specimen) -> Iterator[tuple[str, float]]:
    """The numbers that the model and its configurations name, those inside a configuration's dicts included."""
    for module in seen.model.modules():
        for holder in (module, getattr(module, "config", None), getattr(module, "args", None)):
            values = holder if isinstance(holder, dict) else _attributes(holder)
            inside = [value for value in values.values() if isinstance(value, dict)]
            for each in (values, *inside):
                for name, value in each.items():
                    if isinstance(name, str) and isinstance(value, int | float) and not isinstance(value, bool):
                        yield name, float(value)


def _attributes(holder: Any) -> dict[str, Any]:
    """Of an object; of a configuration those of its class too, where some keep their values."""
    kinds = () if holder is None or isinstance(holder, nn.Module) else type(holder).__mro__[-2::-1]
    return {name: value for each in (*kinds, holder) for name, value in getattr(each, "__dict__", {}).items()}


def _bases(seen: Specimen) -> tuple[float, ...]:
    """Rotary bases to try: what the model or its configuration says, then the usual ones."""
    said = [value for name, value in _numbers(seen) if ("theta" in name or "base" in name) and value > 1]
    return tuple(dict.fromkeys((*said, *USUAL_BASES)))


def _stretches(seen: Specimen) -> tuple[Stretch, ...]:
    """Stretched rotary frequencies to try: what a configuration says, and Llama 3.1's."""
    said = dict(_numbers(seen))
    factor = next((value for name, value in said.items() if name in FACTORS and value > 1), None)
    original = next((value for name, value in said.items() if name in ORIGINALS), 8192.0)
    if factor is None:
        return USUAL_STRETCHES
    low, high = said.get("low_freq_factor", 1.0), said.get("high_freq_factor", 4.0)
    return tuple(dict.fromkeys((Stretch(factor, low, high, original), Stretch(factor), *USUAL_STRETCHES)))
