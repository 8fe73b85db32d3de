"""Which plan and variant of a family the subject is: its weights are mapped, and its logits compared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..expect import note
from ..subject import Subject, one_thread
from .aspects.constants import norm_form
from .closeness import Candidate, disagreement, nearest
from .reference import USUAL_BASES, USUAL_EPS, USUAL_SCALINGS, RopeScaling, norms_of, variants
from .specimen import Fit, Specimen, specimen_of
from .weights.planning import plans, undetermined
from .weights.roles import NoPlan, Plan
from .weights.table import plans_from_table, shown

FAMILIES = ("gpt2", "llama")
LARGEST_EPS = 1e-4  # a larger epsilon is not a choice that a family leaves open
# What configurations call the factor of RoPE scaling, and the context length of the training.
FACTORS = ("factor", "rope_factor", "scale_factor", "rope_scale_factor", "scaling_factor")
ORIGINALS = ("original_max_position_embeddings", "original_context_length", "old_context_len", "original_max_seq_len")
FIRST = 16  # candidates that are tried before the nearest is searched choice by choice
SECONDS = 1.5  # of processor time for one fit


def fit_to(subject: Subject, family: str) -> Fit:
    """How well the subject fits this family; found once per subject. Notes its weights in the verdict."""
    fit = subject.once(_fit_subject, family)
    fit.specimen.recover()
    if fit.plan is not None:
        note(weights=shown(fit.plan))
        if not fit.agrees and (open_ := undetermined(fit.plan)):
            note(unsettled=open_)
    return fit


def _fit_subject(subject: Subject, family: str) -> Fit:
    return fit_specimen(specimen_of(subject), family)


def fit_specimen(specimen: Specimen, family: str) -> Fit:
    """The plan and variant of the family that give the specimen's logits; the best that was tried if none does."""
    start = time.process_time()
    fit = Fit(family, specimen, specimen.logits())
    table = specimen.subject.spec.table
    inventory, shape = specimen.inventory, specimen.shape
    try:
        candidates = list(plans_from_table(inventory, shape, table) if table else plans(inventory, shape))
    except NoPlan as reason:
        fit.why_not = str(reason)
        return fit
    fit.why_not = unlike(candidates[0], family)
    if fit.why_not:
        return fit
    with one_thread():
        grouped = candidates[0].n_kv_head != shape.n_head
        open_ = variants(family, _eps(specimen, candidates[0]), _bases(specimen), grouped, _scalings(specimen))
        if bool((fit.theirs.logsumexp(-1).abs() < 1e-9).all()):
            open_ = [replace(variant, log_probabilities=True) for variant in open_]
        fit.candidates = [(plan, variant) for plan in candidates for variant in open_]
        _try(fit, fit.candidates[:FIRST])
        if not fit.agrees:
            _try(fit, [(plan, variant) for plan, variant, _ in nearest(fit)])
        if not fit.agrees:
            _try(fit, fit.candidates[FIRST:], until=start + SECONDS)
    fit.seconds = time.process_time() - start
    return fit


def _try(fit: Fit, candidates: list[Candidate], until: float = float("inf")) -> None:
    """Compares one after another until one agrees; keeps the best."""
    for plan, variant in candidates:
        if fit.agrees or time.process_time() > until:
            return
        error = disagreement(fit.specimen, plan, variant, fit.theirs)
        fit.tried += 1
        if fit.error is None or error < fit.error:
            fit.plan, fit.variant, fit.error = plan, variant, error


def unlike(plan: Plan, family: str) -> str:
    """Why these weights cannot be this family's; "" if they can."""
    if family == "gpt2" and plan.positions is None and not plan.gated:
        T, C = plan.shape.block_size, plan.shape.n_embd
        return f"it has no position embedding (no weight or buffer outside the layers has shape [{T}, {C}])"
    if family == "gpt2" and plan.gated:
        return "its feed-forward has a gate (three matrices); GPT-2's has none"
    if family == "llama" and not plan.gated:
        return "its feed-forward has no gate; Llama's has one (SwiGLU, three matrices)"
    return ""


def _eps(specimen: Specimen, plan: Plan) -> list[tuple[float, ...]]:
    """The epsilons to try: those measured, else the usual ones."""
    forms = [norm_form(specimen, plan, name) for name in norms_of(plan)]
    if all(form is not None for form in forms):
        eps = [form.eps if form.eps <= LARGEST_EPS else 1e-5 for form in forms if form is not None]
        return [tuple(eps)]
    return [(eps,) for eps in USUAL_EPS]


def _numbers(specimen: Specimen) -> Iterator[tuple[str, float]]:
    """The numbers among the attributes of the model's modules and configurations, and inside dicts of these."""
    for module in specimen.model.modules():
        for holder in (module, getattr(module, "config", None), getattr(module, "args", None)):
            values = holder if isinstance(holder, dict) else _attributes(holder)
            inside = [value for value in values.values() if isinstance(value, dict)]
            for each in (values, *inside):
                for name, value in each.items():
                    if isinstance(name, str) and isinstance(value, int | float) and not isinstance(value, bool):
                        yield name, float(value)


def _attributes(holder: Any) -> dict[str, Any]:
    """The attributes of an object; of a configuration those of its class too, where some keep their values."""
    kinds = () if holder is None or isinstance(holder, nn.Module) else type(holder).__mro__[-2::-1]
    return {name: value for each in (*kinds, holder) for name, value in getattr(each, "__dict__", {}).items()}


def _bases(specimen: Specimen) -> tuple[float, ...]:
    """RoPE bases to try: those in the model or its configuration, then the usual ones."""
    own = [value for name, value in _numbers(specimen) if ("theta" in name or "base" in name) and value > 1]
    return tuple(dict.fromkeys((*own, *USUAL_BASES)))


def _scalings(specimen: Specimen) -> tuple[RopeScaling, ...]:
    """RoPE scalings to try: that of the configuration, and Llama 3.1's."""
    own = dict(_numbers(specimen))
    factor = next((value for name, value in own.items() if name in FACTORS and value > 1), None)
    original = next((value for name, value in own.items() if name in ORIGINALS), 8192.0)
    if factor is None:
        return USUAL_SCALINGS
    low, high = own.get("low_freq_factor", 1.0), own.get("high_freq_factor", 4.0)
    return tuple(dict.fromkeys((RopeScaling(factor, low, high, original), RopeScaling(factor), *USUAL_SCALINGS)))
