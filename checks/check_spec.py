"""Agreement with a declared architecture: with the same weights, GPT-2 or Llama must give the model's numbers.

`--spec gpt2` and `--spec llama` declare one. Without a declaration the family that fits is reported, and nothing fails.
"""

from __future__ import annotations

from collections import Counter

import torch

from .expect import READABLE, NotApplicable, Where, advise, fail, needs, note
from .family.aspects.constants import norm_form, remarks, scale_that_differs, unusual_epsilon
from .family.aspects.decoding import draws, last_positions
from .family.aspects.learning import (
    SITES,
    Dropout,
    InitialConstant,
    InitialMatrices,
    dropouts,
    gradients,
    initialization,
)
from .family.blame import Explained, explain, first_part_that_differs
from .family.fit import FAMILIES, fit_to
from .family.known_bugs import Simulated
from .family.specimen import Fit, specimen_of
from .family.trace import FirstDifference
from .subject import Subject
from .watch.location import locate
from .watch.scales import ScoreScales

NAMES = {"gpt2": "GPT-2", "llama": "Llama"}
SIMULATION_SECONDS = 5.0  # of processor time for trying known bugs
AUTO_SECONDS = 1.5  # the same without a declaration
LOGITS = (*READABLE, "check_spec.check_logits_agree")
GRADIENT = 1e-8  # of a tensor's largest gradient, in float64; correct models differ by 1e-14 of it
PROBABILITY = 1e-6  # relative, per token, in float64; correct models differ by 1e-13
SCALE = 1e-6  # relative to 1/√D; measured in float64 it is exact to 1e-12


def declared(subject: Subject) -> str | None:
    """The architecture declared by the user or by the subject itself; None for "auto"."""
    asked = subject.spec.family
    if asked in FAMILIES:
        return asked
    own: str | None = subject.declared("spec")
    return own


@needs(*READABLE)
def check_logits_agree(subject: Subject) -> None:
    """With the same weights, the declared architecture must give the same logits."""
    family = declared(subject)
    if family is None:
        return report(subject)
    fit = fit_to(subject, family)
    if fit.agrees:
        return note_fit(fit)
    if fit.why_not:
        fail(
            f"the model is not a {NAMES[family]}: {fit.why_not}",
            advice=f"Compare your model's parameters with those of a {NAMES[family]}. "
            "--spec auto reports which family fits.",
            family=family,
        )
    fail_with_cause(fit, explain(fit, SIMULATION_SECONDS))


def report(subject: Subject) -> None:
    """Without a declaration: which family and variant fits, as advice."""
    fits = [fit_to(subject, family) for family in FAMILIES]
    for fit in fits:
        if fit.agrees:
            note_fit(fit)
            advise(f"the model is a {NAMES[fit.family]} ({fit.variant}): the reference gives the same logits")
            return
    note(why_not={fit.family: fit.why_not for fit in fits if fit.why_not})
    for fit in fits:
        why = explain(fit, AUTO_SECONDS) if fit.plan is not None else None
        if why is not None and why.ids:
            name = NAMES[fit.family]
            advise(
                f"the logits equal those of a {name} ({why.variant}) with {named(why)}: {says(why)}. "
                f"This is a bug if you meant {name}, otherwise a design choice"
            )
            return
    raise NotApplicable("the logits are neither a GPT-2's nor a Llama's, and no architecture is declared",
                        why={f.family: f.why_not or f"logits differ by {f.error:.2g}" for f in fits})  # fmt: skip


def note_fit(fit: Fit) -> None:
    assert fit.plan is not None and fit.variant is not None
    note(family=fit.family, variant=fit.variant.words(), tied=fit.plan.tied, key_value_heads=fit.plan.n_kv_head,
         error=fit.error, bound=fit.specimen.bound.size)  # fmt: skip


def fail_with_cause(fit: Fit, why: Explained | None) -> None:
    """Fails, naming the known bug that gives these logits and the first part that differs."""
    name = NAMES[fit.family]
    text = f"the logits are not those of a {name} with the same weights: "
    text += f"they differ by up to {fit.error:.3g} times the largest logit"
    first = first_part_that_differs(fit, why.plan, why.variant) if why is not None else None
    if why is not None and why.ids:
        text += f". They equal those of a {name} with {named(why)}: {says(why)}"
    else:
        text += ". They equal those of no known bug"
        text += "" if why is None or why.complete else f" that could be tried in {SIMULATION_SECONDS:g} s"
    text += f". {sentence(first)}" if first is not None else ""
    fail(
        text,
        where=first.where if first else None,
        likely=tuple(why.ids) if why else (),
        advice=f"Compare this part with the {name} in transformer/model.py: print the inputs and outputs of both.",
        family=fit.family,
        error=fit.error,
        variant=why.variant.words() if why else [],
        stages=why.parts if why else [],
        first_part_that_differs=first.differs if first else None,
    )


def named(why: Explained) -> str:
    """`a` or `b` (ties), and `c`."""
    groups = [why.ties] if why.ties else why.together
    return " and ".join(" or ".join(f"`{one.bug.id}`" for one in group) for group in groups)


def says(why: Explained) -> str:
    groups = [why.ties] if why.ties else why.together
    return "; and ".join(", or (with the same logits) ".join(map(told, group)) for group in groups)


def told(one: Simulated) -> str:
    return f"{one.bug.says} (here {one.scope})" if one.scope else one.bug.says


def sentence(first: FirstDifference) -> str:
    text = str(first)
    return text[0].upper() + text[1:]


def agreeing(subject: Subject) -> Fit:
    """The fit to the declared family. Raises NotApplicable if none is declared or the logits differ."""
    family = declared(subject)
    if family is None:
        raise NotApplicable("no architecture is declared (--spec gpt2 or --spec llama)")
    fit = fit_to(subject, family)
    if not fit.agrees:
        raise NotApplicable("the logits already differ: see check_logits_agree", error=fit.error)
    return fit


@needs(*LOGITS)
def check_gradients_agree(subject: Subject) -> None:
    """With the same weights, every weight must get the same gradient as in the declared architecture."""
    fit = agreeing(subject)
    if fit.specimen.dtype != torch.float64:
        raise NotApplicable("the model does not run in float64, so its gradients are rounded")
    pairs = gradients(fit)
    note(compared=len(pairs), largest=max(pair.error for pair in pairs), bound=GRADIENT)
    wrong = [pair for pair in pairs if pair.error > GRADIENT]
    if not wrong:
        return
    first = wrong[0]
    fail(
        f"the logits agree, but the gradient of {first.theirs} is {first.ratio:.3g} times that of a "
        f"{NAMES[fit.family]} (they differ by up to {first.error:.3g} times the largest entry, allowed "
        f"{GRADIENT:.0e}); {len(wrong)} of {len(pairs)} gradients differ",
        where=owner_of(fit, first.theirs),
        likely=("embedding-gradient-by-count", "embedding-no-grad", "head-detached"),
        advice="Look for detach(), no_grad(), .data, a custom backward or scale_grad_by_freq before this weight.",
        gradients={pair.theirs: pair.ratio for pair in wrong},
    )


@needs(*LOGITS)
def check_tiny_activations_agree(subject: Subject) -> None:
    """The logits must also agree with tiny embeddings, where the epsilon of the norms dominates."""
    fit = agreeing(subject)
    scale = scale_that_differs(fit)
    if scale is None:
        return expect_usual_epsilon(fit)
    assert fit.plan is not None
    plan, specimen = fit.plan, fit.specimen
    fail(
        f"with the embeddings multiplied by {scale.factor:g}, the logits differ by up to {scale.error:.3g} times the "
        f"largest: the epsilon of {scale.norm} is not added to the variance under the root",
        where=locate(specimen.model, scale.module) if scale.module else None,
        likely=("norm-epsilon-is-a-floor",),
        advice="Compute x / sqrt(mean square + epsilon), without a clamp, a maximum or an epsilon that depends on x.",
        norms={name: str(norm_form(specimen, plan, name)) for name in ("attention_norm", "norm")},
        factor=scale.factor,
    )


def expect_usual_epsilon(fit: Fit) -> None:
    unusual = unusual_epsilon(fit)
    if unusual is None:
        return
    norm, module, eps = unusual
    fail(
        f"{norm} has an epsilon of {eps:.3g}; a {NAMES[fit.family]} has a power of ten, 1e-5 or 1e-6",
        where=locate(fit.specimen.model, module) if module else None,
        likely=("norm-epsilon-doubled",),
        advice="Take epsilon from the configuration that belongs to the weights, and add it once.",
        epsilon=eps,
    )


@needs(*LOGITS)
def check_last_position_agrees(subject: Subject) -> None:
    """A call that returns only the last position must return the declared architecture's logits there."""
    fit = agreeing(subject)
    calls = last_positions(fit)
    if not calls:
        raise NotApplicable("every call returns the logits of all positions")
    note(calls=sorted({call.how for call in calls}), largest=max(call.error for call in calls))
    for call in calls:
        if call.error > fit.specimen.bound.size:
            meant = call.meant(fit.theirs[:, : call.tokens.shape[1]])
            fail(
                f"{call.how} does not return the logits of the last of {call.tokens.shape[1]} positions "
                f"(they differ by up to {call.error:.3g} times the largest logit)"
                + (f", but those of {meant}" if meant else ""),
                likely=("last-position-is-the-first",) if meant == "position 0" else ("last-position-of-the-last-row",)
                if "last row" in meant else (),
                advice="Use logits = head(x[:, [-1], :]): the last position of every row, with the axis kept.",
                how=call.how,
                these_are=meant or None,
            )  # fmt: skip


@needs(*LOGITS)
def check_generation_draws_from_the_logits(subject: Subject) -> None:
    """At temperature 1, generate must draw from the softmax of the declared architecture's last logits."""
    fit = agreeing(subject)
    seen = draws(fit)
    note(
        draws=len(seen),
        kept=sorted({len(draw.theirs) for draw in seen}),
        powers=sorted({round(d.power, 6) for d in seen}),
    )
    allowed = PROBABILITY if fit.specimen.dtype == torch.float64 else 1e-4
    wrong = next((draw for draw in seen if draw.error_of_power > allowed), None)
    if wrong is not None:
        rank = wrong.worst
        fail(
            f"when generate draws token {wrong.step + 1} of row {wrong.row}, the token of rank {rank + 1} has "
            f"probability {float(wrong.theirs[rank]):.3g}, expected {float(wrong.ours[rank]):.3g} (softmax of a "
            f"{NAMES[fit.family]}'s logits after the same tokens)",
            likely=("generation-of-the-last-row", "generate-first-position-logits"),
            advice="Use probabilities = (logits[:, -1] / temperature).softmax(-1), the last position of each row.",
            step=wrong.step,
            row=wrong.row,
        )
    if (odd := next((draw for draw in seen if draw.error > allowed), None)) is not None:
        advise(f"asked for temperature 1, generate draws at temperature {1 / odd.power:.4g}")


@needs(*LOGITS)
def check_weights_are_the_familys(subject: Subject) -> None:
    """Every weight must have a place in the declared architecture; a head that starts as the embedding must be tied."""
    fit = agreeing(subject)
    plan = fit.plan
    assert plan is not None
    more = [w for w in plan.unplaced if w.trained and w.tensor.requires_grad]
    total = sum(w.numel for w in plan.inventory.weights if w.trained)
    note(parameters=total, of_them_without_a_place=sum(w.numel for w in more), tied=plan.tied)
    if more:
        fail(
            f"{sum(w.numel for w in more):,} of {total:,} parameters do not exist in a {NAMES[fit.family]} and have no "
            f"effect on the logits: {', '.join(map(str, more[:3]))}{', …' if len(more) > 3 else ''}",
            where=owner_of(fit, more[0].name),
            likely=("weights-without-a-place",),
            advice="Use these weights or remove them: they are saved and counted, but never trained.",
            weights=[str(w) for w in more],
        )
    if not plan.tied and plan.head.start.shape == plan.embedding.start.shape:
        if bool((plan.head.start == plan.embedding.start).all()):
            fail(
                f"{plan.head.name} starts as a copy of {plan.embedding.name} but is another parameter: they become "
                "different with the first training step",
                likely=("tied-weights-broken",),
                advice="Assign the Parameter itself, head.weight = embedding.weight, after initialization.",
            )
        if fit.family == "gpt2":
            advise(f"the head is not tied to the embedding, as GPT-2's is ({plan.head.numel:,} more parameters)")
    if plan.head_bias is not None:
        advise(f"the head has a bias ({plan.head_bias}); GPT-2 and Llama have none")
    for remark in remarks(fit):
        advise(remark)


@needs(*LOGITS)
def check_initialization_is_the_familys(subject: Subject) -> None:
    """Weights must be initialized as GPT-2's: N(0, 0.02²), output projections over √(2L), biases 0, gains 1."""
    fit = agreeing(subject)
    if fit.family != "gpt2":
        raise NotApplicable("no initialization is published for Llama")
    matrices, constants = initialization(fit)
    note(deviations={f"{m.role} ({m.name})": m.deviation for m in matrices})
    for matrix in matrices:
        if not matrix.fits:
            fail_for_matrix(fit, matrix, matrices)
    for constant in constants:
        if not constant.fits:
            fail_for_constant(fit, constant)


def owner_of(fit: Fit, weight: str) -> Where | None:
    owner = weight.rpartition(".")[0]
    return locate(fit.specimen.model, owner) if owner in dict(fit.specimen.model.named_modules()) else None


def fail_for_matrix(fit: Fit, wrong: InitialMatrices, matrices: list[InitialMatrices]) -> None:
    L = len(fit.specimen.inventory.layers)
    ratio = wrong.deviation / wrong.wanted[0]
    others = sum(not m.fits for m in matrices) - 1
    known = {(2 * L) ** 0.5: "residual-init-unscaled", 2**0.5: "residual-init-counts-layers-once"}
    likely = [bug for factor, bug in known.items() if "output" in wrong.role and abs(ratio / factor - 1) < 0.03]
    fail(
        f"{wrong.role} ({wrong.name}): the initial standard deviation is {wrong.deviation:.4g} (mean "
        f"{float(wrong.values.mean()):.2g}), expected {wrong.wanted[0]:.4g} for GPT-2 ({ratio:.3g} times as much; "
        f"±{wrong.tolerance(wrong.wanted[0]) / wrong.wanted[0]:.1%} allowed for {len(wrong.values):,} weights)"
        + (f"; {others + 1} of {len(matrices)} kinds of matrices differ" if others else ""),
        where=owner_of(fit, wrong.name),
        likely=likely or ("init-left-to-pytorch",),
        advice="Draw every matrix with std=0.02, and the output projections of attention and feed-forward with "
        "std=0.02 / √(2 n_layer), after all modules are built.",
        role=wrong.role,
        deviation=wrong.deviation,
        wanted=list(wrong.wanted),
    )


def fail_for_constant(fit: Fit, wrong: InitialConstant) -> None:
    low, high = float(wrong.values.min()), float(wrong.values.max())
    fail(
        f"the {wrong.role} {wrong.name} starts with values from {low:.3g} to {high:.3g}, expected {wrong.wanted:g}",
        where=owner_of(fit, wrong.name),
        likely=("bias-init-random",) if wrong.role == "bias" else ("gain-init-random",),
        advice="Initialize biases with 0 and gains with 1: nn.Linear draws random biases by default.",
        role=wrong.role,
    )


@needs(*LOGITS)
def check_dropout_sites_are_the_familys(subject: Subject) -> None:
    """A GPT-2 must apply dropout to the embedding, the attention weights and both sublayer outputs, nowhere else."""
    fit = agreeing(subject)
    L = len(fit.specimen.inventory.layers)
    seen = dropouts(fit)
    sites = Counter(SITES.get(d.part or "", "elsewhere") for d in seen)
    note(sites=dict(sites), rates=sorted({d.rate for d in seen}))
    if fit.family != "gpt2":
        raise NotApplicable("Llama is published without dropout, so no place is right or wrong", sites=dict(sites))
    for odd in (d for d in seen if d.part not in SITES):
        fail_for_site(odd)
    wanted = {"the embedding": 1, "attention weights": L, "attention's output": L, "the feed-forward's output": L}
    lacking = {site: n - sites[site] for site, n in wanted.items() if sites[site] < n}
    twice = {site: sites[site] - n for site, n in wanted.items() if sites[site] > n}
    if lacking:
        fail(
            "no dropout on "
            + " and ".join(site + (f" in {n} of {L} blocks" if n < wanted[site] else "") for site, n in lacking.items())
            + ". GPT-2 applies dropout to the embedding, the attention weights and both outputs of every block",
            likely=("dropout-site-missing",),
            advice="Embedding: dropout(tokens + positions). Attention: dropout(softmax) and dropout(projection). "
            "Feed-forward: dropout(projection).",
            missing=lacking,
        )
    if twice:
        fail(f"dropout is applied twice to {' and '.join(twice)}", likely=("dropout-twice",),
             advice="Apply dropout once per place: twice at rate p drops 1 - (1 - p)².", twice=twice)  # fmt: skip


MISPLACED = {"attention scores": "dropout-before-the-softmax", "norm before": "dropout-on-the-norm",
             "activation": "dropout-inside-the-feed-forward"}  # fmt: skip


def fail_for_site(odd: Dropout) -> None:
    what = f"the {odd.part}" + ("" if odd.block is None else f" of block {odd.block}")
    fail(
        f"dropout is applied to {what if odd.part else 'a tensor that GPT-2 does not compute'}, at {odd.where}. GPT-2 "
        "applies it to the embedding, the attention weights and the outputs of attention and feed-forward",
        where=odd.where,
        likely=next(((bug,) for part, bug in MISPLACED.items() if part in (odd.part or "")), ()),
        advice="Move it after the softmax, or after the projection whose result is added to the residual stream.",
        part=odd.part,
    )


@needs(*LOGITS)
def check_attention_scale_is_usual(subject: Subject) -> None:
    """Attention scores must be divided by the square root of the head width before the softmax."""
    specimen = specimen_of(subject)
    tokens = specimen.tokens[:2].contiguous()
    with torch.no_grad(), specimen.running(), ScoreScales(specimen.model, tokens.shape[1]) as scales:
        specimen.subject.logits(specimen.model, tokens)
    known = [scale for scale in scales.found if scale.factor != 1.0]
    if not known:
        raise NotApplicable("no factor is applied between q @ k and the softmax: the queries may be scaled before")
    note(factors=sorted({scale.factor for scale in known}), head_width=known[0].head_width)
    odd = next((scale for scale in known if abs(scale.of_usual - 1) > SCALE), None)
    if odd is None:
        return
    text = (
        f"attention scores are multiplied by {odd.factor:.6g}, {odd.of_usual:.4g} times the usual "
        f"1/√{odd.head_width} = {odd.head_width**-0.5:.6g}"
    )
    if declared(subject) is None:
        advise(f"{text}: a design choice (muP, T5) or a mistake")
        return
    fail(text, where=odd.where, likely=("scale-by-d-model", "scale-without-root", "scale-multiplied"),
         advice="Use scores = q @ k.transpose(-2, -1) / head_width ** 0.5.", factor=odd.factor)  # fmt: skip
