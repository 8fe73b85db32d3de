"""A declared architecture is an exact oracle: the reference with the subject's own weights must give its numbers.

`--spec gpt2` and `--spec llama` declare; by default the family and variant that fit are reported, and nothing fails.
"""

from __future__ import annotations

from collections import Counter

import torch

from .expect import READABLE, NotApplicable, Where, advise, fail, needs, note
from .family.aspects.drawing import draws
from .family.aspects.dropping import SITES, Dropped, dropped
from .family.aspects.gradients import slopes
from .family.aspects.initialization import Constant, Drawn, drawn
from .family.aspects.last import last_positions
from .family.aspects.remarks import remarks
from .family.aspects.scores import Scales
from .family.aspects.tiny import odd_epsilon, parting_scale
from .family.blame import Simulated
from .family.fit import FAMILIES, norm_form, settled
from .family.specimen import Settled, specimen
from .family.stages import Explained, explain, part_from
from .family.trace import Parting
from .subject import Subject
from .watch.location import locate

NAMES = {"gpt2": "GPT-2", "llama": "Llama"}
SIMULATION_SECONDS = 5.0  # of processor time, as all here
AUTO_SECONDS = 1.5  # without a declaration
LOGITS = (*READABLE, "check_spec.check_logits_agree")
GRADIENT = 1e-8  # of a tensor's largest gradient, in float64; correct models differ by 1e-14 of it
PROBABILITY = 1e-6  # relative, of a token, in float64; correct models differ by 1e-13
SCALE = 1e-6  # of the usual factor: one read off float64 numbers is exact to 1e-12


def declared(subject: Subject) -> str | None:
    """The architecture that the user, or the subject itself, declares; None for "auto"."""
    asked = subject.spec.family
    return asked if asked in FAMILIES else subject.declared("spec")


@needs(*READABLE)
def check_logits_agree(subject: Subject) -> None:
    """On the same weights the logits are those of the declared architecture."""
    family = declared(subject)
    if family is None:
        return report(subject)
    found = settled(subject, family)
    if found.agrees:
        return agreed(found)
    if found.why_not:
        fail(
            f"this is no {NAMES[family]}: {found.why_not}",
            advice=f"Compare its parameters with a {NAMES[family]}'s; --spec auto says what fits, if anything does.",
            family=family,
        )
    differ(found, explain(found, SIMULATION_SECONDS))


def report(subject: Subject) -> None:
    """Which family and variant fits, without a declaration: advice at most."""
    results = [settled(subject, family) for family in FAMILIES]
    for found in results:
        if found.agrees:
            agreed(found)
            advise(f"this is a {NAMES[found.family]} ({found.variant}): the reference gives the same logits")
            return
    note(why_not={found.family: found.why_not for found in results if found.why_not})
    for found in results:
        why = explain(found, AUTO_SECONDS) if found.plan is not None else None
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
    return "; and ".join(" or, which is the same here, ".join(map(told, group)) for group in groups)


def told(one: Simulated) -> str:
    return f"{one.bug.says} (here {one.scope})" if one.scope else one.bug.says


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
        advice=f"Compare that part with the {name} of transformer/model.py, its inputs printed side by side.",
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


def agreeing(subject: Subject) -> Settled:
    """How the subject compares with the declared family; NotApplicable without a declaration or an agreement."""
    family = declared(subject)
    if family is None:
        raise NotApplicable("no architecture is declared (--spec gpt2 or --spec llama)")
    found = settled(subject, family)
    if not found.agrees:
        raise NotApplicable("the logits differ already: check_logits_agree says where", error=found.error)
    return found


@needs(*LOGITS)
def check_gradients_agree(subject: Subject) -> None:
    """On the same weights every weight's gradient is that of the declared architecture."""
    found = agreeing(subject)
    if found.specimen.dtype != torch.float64:
        raise NotApplicable("the model does not run in float64: its gradients are rounded")
    compared = slopes(found)
    note(compared=len(compared), largest=max(slope.error for slope in compared), bound=GRADIENT)
    wrong = [slope for slope in compared if slope.error > GRADIENT]
    if not wrong:
        return
    first = wrong[0]
    fail(
        f"the logits agree, but the gradient of {first.theirs} is {first.ratio:.3g} times a {NAMES[found.family]}'s "
        f"(difference {first.error:.3g} of the largest, allowed {GRADIENT:.0e}); {len(wrong)} of {len(compared)} "
        "gradients differ",
        where=owner_of(found, first.theirs),
        likely=("embedding-gradient-by-count", "embedding-no-grad", "head-detached"),
        advice="look for detach(), no_grad(), .data, a backward of its own or scale_grad_by_freq on the way",
        gradients={slope.theirs: slope.ratio for slope in wrong},
    )


@needs(*LOGITS)
def check_tiny_activations_agree(subject: Subject) -> None:
    """With tiny embeddings, where a norm's epsilon rules, the logits are still those of the declared architecture."""
    found = agreeing(subject)
    scale = parting_scale(found)
    if scale is None:
        return expect_usual_epsilon(found)
    forms = {name: str(norm_form(found.specimen, found.plan, name)) for name in ("attention_norm", "norm")}  # type: ignore[arg-type]
    fail(
        f"the logits agree, but not with embeddings multiplied by {scale.factor:g}: there {scale.norm} gives other "
        f"numbers (difference {scale.error:.3g} of the largest logit). Its epsilon is not added under the root",
        where=locate(found.specimen.model, scale.module) if scale.module else None,
        likely=("norm-epsilon-is-a-floor",),
        advice="x / sqrt(mean square + epsilon): no clamp, no maximum, no epsilon that depends on the input",
        norms=forms,
        factor=scale.factor,
    )


def expect_usual_epsilon(found: Settled) -> None:
    odd = odd_epsilon(found)
    if odd is None:
        return
    norm, module, eps = odd
    fail(
        f"{norm} adds an epsilon of {eps:.3g} to its mean square: that is no {NAMES[found.family]}'s, whose epsilons "
        "are powers of ten (1e-5, 1e-6)",
        where=locate(found.specimen.model, module) if module else None,
        likely=("norm-epsilon-doubled",),
        advice="what was published, or saved beside the weights, has its epsilon in the configuration",
        epsilon=eps,
    )


@needs(*LOGITS)
def check_last_position_agrees(subject: Subject) -> None:
    """A call that answers for the last position alone gives the last position's logits of the declared architecture."""
    found = agreeing(subject)
    calls = last_positions(found)
    if not calls:
        raise NotApplicable("every call answers for all positions")
    note(calls=sorted({call.how for call in calls}), largest=max(call.error for call in calls))
    for call in calls:
        if call.error > found.specimen.bound.size:
            meant = call.meant(found.theirs[:, : call.tokens.shape[1]])
            fail(
                f"{call.how} does not answer with the logits of the last of {call.tokens.shape[1]} positions "
                f"(difference {call.error:.3g} of the largest)" + (f": these are those of {meant}" if meant else ""),
                likely=("last-position-is-the-first",) if meant == "position 0" else ("last-position-of-the-last-row",)
                if "last row" in meant else (),
                advice="logits = head(x[:, [-1], :]): the last position of every row, kept as an axis",
                how=call.how,
                these_are=meant or None,
            )  # fmt: skip


@needs(*LOGITS)
def check_generation_draws_from_the_logits(subject: Subject) -> None:
    """What generate draws from at temperature 1 is the softmax of the declared architecture's last logits."""
    found = agreeing(subject)
    seen = draws(found)
    note(
        draws=len(seen),
        kept=sorted({len(draw.theirs) for draw in seen}),
        powers=sorted({round(d.power, 6) for d in seen}),
    )
    allowed = PROBABILITY if found.specimen.dtype == torch.float64 else 1e-4
    wrong = next((draw for draw in seen if draw.error_of_power > allowed), None)
    if wrong is not None:
        place = int((wrong.theirs.log() - wrong.ours.log()).abs().argmax())
        fail(
            f"drawing token {wrong.step + 1} of row {wrong.row}, the token of rank {place + 1} has probability "
            f"{float(wrong.theirs[place]):.3g}, and {float(wrong.ours[place]):.3g} in the softmax of a "
            f"{NAMES[found.family]}'s logits after the same tokens",
            likely=("generation-of-the-last-row", "generate-first-position-logits"),
            advice="probabilities = (logits[:, -1] / temperature).softmax(-1), of each row's own last position",
            step=wrong.step,
            row=wrong.row,
        )
    if (odd := next((draw for draw in seen if draw.error > allowed), None)) is not None:
        advise(f"asked for temperature 1, generate draws at {1 / odd.power:.4g}")


@needs(*LOGITS)
def check_weights_are_the_familys(subject: Subject) -> None:
    """Every weight has a place in the declared architecture, and a head that starts as the embedding is tied to it."""
    found = agreeing(subject)
    plan = found.plan
    assert plan is not None
    more = [w for w in plan.unplaced if w.trained and w.tensor.requires_grad]
    total = sum(w.numel for w in plan.inventory.weights if w.trained)
    note(parameters=total, of_them_without_a_place=sum(w.numel for w in more), tied=plan.tied)
    if more:
        fail(
            f"{sum(w.numel for w in more):,} of {total:,} parameters have no place in a {NAMES[found.family]} and "
            f"change nothing: {', '.join(map(str, more[:3]))}{', …' if len(more) > 3 else ''}",
            where=owner_of(found, more[0].name),
            likely=("weights-without-a-place",),
            advice="use these weights or remove them: they are saved, decayed and counted, and never trained",
            weights=[str(w) for w in more],
        )
    if not plan.tied and plan.head.start.shape == plan.embedding.start.shape:
        if bool((plan.head.start == plan.embedding.start).all()):
            fail(
                f"{plan.head.name} starts as a copy of {plan.embedding.name} and is not the same parameter: the two "
                "part with the first step",
                likely=("tied-weights-broken",),
                advice="assign the Parameter itself, head.weight = embedding.weight, after initialization",
            )
        if found.family == "gpt2":
            advise(f"the head has a table of its own ({plan.head.numel:,} weights more): GPT-2's is its embedding")
    if plan.head_bias is not None:
        advise(f"the head has a bias ({plan.head_bias}), which neither GPT-2's nor Llama's has")
    for remark in remarks(found):
        advise(remark)


@needs(*LOGITS)
def check_initialization_is_the_familys(subject: Subject) -> None:
    """Weights start as published: for GPT-2 N(0, 0.02²), divided by √(2L) into the stream; biases zero, gains one."""
    found = agreeing(subject)
    if found.family != "gpt2":
        raise NotApplicable("Llama's authors publish no rule of initialization")
    matrices, constants = drawn(found)
    note(deviations={f"{d.role} ({d.name})": d.deviation for d in matrices})
    for drawn_ in matrices:
        if not drawn_.fits:
            blame_draw(found, drawn_, matrices)
    for constant in constants:
        if not constant.fits:
            blame_constant(found, constant)


def owner_of(found: Settled, weight: str) -> Where | None:
    owner = weight.rpartition(".")[0]
    return locate(found.specimen.model, owner) if owner in dict(found.specimen.model.named_modules()) else None


def blame_draw(found: Settled, wrong: Drawn, matrices: list[Drawn]) -> None:
    L = len(found.specimen.inventory.layers)
    ratio = wrong.deviation / wrong.wanted[0]
    others = sum(not d.fits for d in matrices) - 1
    known = {(2 * L) ** 0.5: "residual-init-unscaled", 2**0.5: "residual-init-counts-layers-once"}
    likely = [bug for factor, bug in known.items() if "output" in wrong.role and abs(ratio / factor - 1) < 0.03]
    fail(
        f"{wrong.role} ({wrong.name}) starts with a deviation of {wrong.deviation:.4g} around "
        f"{float(wrong.values.mean()):.2g}, where GPT-2 has {wrong.wanted[0]:.4g} ({ratio:.3g} times as much; allowed "
        f"{wrong.tolerance(wrong.wanted[0]) / wrong.wanted[0]:.1%}, of {len(wrong.values):,} weights)"
        + (f"; {others} other kinds of weights differ too" if others else ""),
        where=owner_of(found, wrong.name),
        likely=likely or ("init-left-to-pytorch",),
        advice="draw every matrix with std=0.02, and the output projections of attention and feed-forward with "
        "0.02 / √(2 n_layer), after all modules are made",
        role=wrong.role,
        deviation=wrong.deviation,
        wanted=list(wrong.wanted),
    )


def blame_constant(found: Settled, wrong: Constant) -> None:
    low, high = float(wrong.values.min()), float(wrong.values.max())
    fail(
        f"the {wrong.role} {wrong.name} starts between {low:.3g} and {high:.3g}, where GPT-2 has {wrong.wanted:g}",
        where=owner_of(found, wrong.name),
        likely=("bias-init-random",) if wrong.role == "bias" else ("gain-init-random",),
        advice="biases start at zero and gains at one: nn.Linear draws its biases unless told otherwise",
        role=wrong.role,
    )


@needs(*LOGITS)
def check_dropout_sites_are_the_familys(subject: Subject) -> None:
    """GPT-2 drops the embedding, attention weights and both outputs of every block, and nothing else."""
    found = agreeing(subject)
    L = len(found.specimen.inventory.layers)
    seen = dropped(found)
    sites = Counter(SITES.get(d.part or "", "elsewhere") for d in seen)
    note(sites=dict(sites), rates=sorted({d.rate for d in seen}))
    if found.family != "gpt2":
        raise NotApplicable("Llama drops nothing as published; where its kin do is left open", sites=dict(sites))
    for odd in (d for d in seen if d.part not in SITES):
        blame_site(odd)
    wanted = {"the embedding": 1, "attention weights": L, "attention's output": L, "the feed-forward's output": L}
    lacking = {site: n - sites[site] for site, n in wanted.items() if sites[site] < n}
    twice = {site: sites[site] - n for site, n in wanted.items() if sites[site] > n}
    if lacking:
        fail(
            "GPT-2 drops units of the embedding, of the attention weights and of both outputs of every block; here "
            + " and ".join(f"{site} is not dropped" + (f" in {n} of {L} blocks" if n < wanted[site] else "")
                           for site, n in lacking.items()),
            likely=("dropout-site-missing",),
            advice="embedding: dropout(tokens + positions); attention: dropout(softmax) and dropout(projection); "
            "feed-forward: dropout(projection)",
            missing=lacking,
        )  # fmt: skip
    if twice:
        fail(f"units are dropped twice: {', '.join(twice)}", likely=("dropout-twice",),
             advice="one dropout a site: two of rate p drop 1 - (1 - p)²", twice=twice)  # fmt: skip


MISPLACED = {"attention scores": "dropout-before-the-softmax", "norm before": "dropout-on-the-norm",
             "activation": "dropout-inside-the-feed-forward"}  # fmt: skip


def blame_site(odd: Dropped) -> None:
    what = f"the {odd.part}" + ("" if odd.block is None else f" of block {odd.block}")
    fail(
        f"{what if odd.part else 'a tensor that GPT-2 does not have'} is dropped, at {odd.where}: GPT-2 drops the "
        "embedding, the attention weights and the outputs of attention and feed-forward",
        where=odd.where,
        likely=next(((bug,) for part, bug in MISPLACED.items() if part in (odd.part or "")), ()),
        advice="move it behind the softmax, or behind the projection that joins the residual stream",
        part=odd.part,
    )


@needs(*LOGITS)
def check_attention_scale_is_usual(subject: Subject) -> None:
    """Attention scores are divided by the square root of the head width, read where they enter the softmax."""
    seen = specimen(subject)
    tokens = seen.tokens[:2].contiguous()
    with torch.no_grad(), seen.running(), Scales(tokens.shape[1]) as scales:
        seen.subject.logits(seen.model, tokens)
    known = [scale for scale in scales.found if scale.factor != 1.0]
    if not known:
        raise NotApplicable("no factor is seen between products and softmax: queries may be scaled beforehand")
    note(factors=sorted({scale.factor for scale in known}), head_width=known[0].head_width)
    odd = next((scale for scale in known if abs(scale.of_usual - 1) > SCALE), None)
    if odd is None:
        return
    text = (f"attention scores are multiplied by {odd.factor:.6g}, {odd.of_usual:.4g} times 1/√{odd.head_width} "
            f"= {odd.head_width**-0.5:.6g}")  # fmt: skip
    if declared(subject) is None:
        advise(f"{text}: a design (muP, T5) or a slip")
        return
    fail(text, where=odd.where, likely=("scale-by-d-model", "scale-without-root", "scale-multiplied"),
         advice="scores = q @ k.transpose(-2, -1) / head_width ** 0.5", factor=odd.factor)  # fmt: skip
