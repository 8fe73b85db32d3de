"""The optimizer: which parameters it holds and updates, which of them decay, and the learning rate."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .expect import FOLLOWS, NotApplicable, Where, advise, fail, needs, note, shown
from .probes.filled import judged
from .probes.module_state import renormalized
from .subject import Subject
from .training.met_groups import Groups, met_groups
from .training.met_optimizer import MetOptimizer, gradients, well_conditioned
from .training.met_step import equal_examples, met_step
from .training.rules import RIGHT, UNSCALED, WRONG, Rule
from .training.runs import Losses, TrainerRun, examples, model_of, needs_trainer, pieces
from .training.steps import at, schedule_ticks_once


@needs(FOLLOWS)
def check_every_parameter_moves(subject: Subject) -> None:
    """Every parameter with a gradient must change in an optimizer step, and a frozen one must not."""
    window = examples(subject, 4)
    model = model_of(subject).float()
    frozen = freeze_one(model)
    if subject.brings("trainer"):
        run = TrainerRun(subject, model, window, sgd=False, batch_size=4, learning_rate=1e-3, weight_decay=0.0)
        steps = [run.step() for _ in range(2)]
    else:
        met = met_step(subject)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
        steps = [met.run(model, optimizer, equal_examples(subject, len(met.first.examples))) for _ in range(2)]
    gradient = pieces(model, at(model, steps[0], Losses(subject, model).mean)[0])
    moved = pieces(model, steps[-1].after - steps[0].before)
    largest = max(float(g.abs().max()) for g in gradient.values())
    still = [n for n, g in gradient.items() if float(g.abs().max()) > 1e-7 * largest and not moved[n].any()]
    if still:
        fail(
            f"{len(still)} of {len(moved)} parameters have a gradient but do not change in 2 steps: {shortened(still)}",
            likely=(
                ("optimizer-misses-embeddings", "optimizer-holds-stale-params")
                if any(piece.any() for piece in moved.values())
                else ("zero-grad-between-backward-and-step",)
            ),
            advice="Create the optimizer from model.parameters(), after moving, tying or replacing any of them.",
            parameters=still,
        )
    if frozen is not None and moved[frozen].any():
        fail(
            f"{frozen} has requires_grad=False but changes in an optimizer step",
            likely=("optimizer-moves-frozen",),
            advice="Pass only parameters that require a gradient to the optimizer: weight decay changes the others.",
        )


def freeze_one(model: nn.Module) -> str | None:
    """Freezes the last one-dimensional parameter, if there is another one, and returns its name."""
    vectors = [name for name, p in model.named_parameters() if p.dim() == 1 and p.requires_grad]
    if len(vectors) < 2:
        return None
    model.get_parameter(vectors[-1]).requires_grad_(False)
    return vectors[-1]


def shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_the_optimizer_owns_each_parameter_once(subject: Subject) -> None:
    """The optimizer must hold each trainable parameter of the model exactly once, and nothing else."""
    needs_trainer(subject)
    model = model_of(subject)
    frozen = freeze_one(model)
    run = TrainerRun(subject, model, examples(subject, 2), sgd=False)
    held = [p for group in run.trainer.optimizer.param_groups for p in group["params"]]
    owned = {id(p): name for name, p in model.named_parameters()}
    missing = [n for n, p in model.named_parameters() if p.requires_grad and all(p is not q for q in held)]
    strangers = [tuple(p.shape) for p in held if id(p) not in owned]
    twice = sorted({owned.get(id(p), "?") for p in held if sum(p is q for q in held) > 1})
    note(parameters=len(owned), held=len(held))
    if missing or strangers or twice:
        likely = ("optimizer-holds-stale-params",) if strangers else ("optimizer-misses-embeddings",)
        says = [f"it misses {shortened(missing)}"] * bool(missing)
        says += [f"it holds {len(strangers)} that do not belong to the model (any more)"] * bool(strangers)
        says += [f"it holds {shortened(twice)} twice"] * bool(twice)
        fail(
            f"the optimizer does not hold each of the model's {len(owned)} parameters once: {'; '.join(says)}",
            likely=("optimizer-holds-twice",) if twice and not missing and not strangers else likely,
            advice="Create the optimizer from model.parameters(), after the model is on its device.",
            missing=missing,
            twice=twice,
        )
    if frozen is not None and any(p is model.get_parameter(frozen) for p in held):
        advise(f"the optimizer holds {frozen}, which is frozen")


def check_the_models_own_optimizer_holds_each_parameter_once(subject: Subject) -> None:
    """An optimizer that the model makes for itself must hold each of its trainable parameters exactly once."""
    groups = met_groups(subject)
    held, trainable = groups.held, {n: p for n, p in groups.model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trainable.items() if all(p is not q for q in held)]
    twice = [name for name, p in trainable.items() if sum(p is q for q in held) > 1]
    note(method=groups.method, held=len(held), parameters=len(trainable))
    if missing or twice:
        says = [f"it misses {shortened(missing)}, which will never be trained"] * bool(missing)
        says += [f"it holds {shortened(twice)} twice"] * bool(twice)
        fail(
            f"the optimizer of {groups.method} does not hold each of the {len(trainable)} trainable parameters once: "
            f"{'; '.join(says)}",
            where=line_of(groups),
            likely=("group-forgets-the-last-norm", "optimizer-misses-embeddings")
            if missing
            else ("optimizer-holds-twice",),
            advice="Split list(named_parameters()) by one condition and its opposite, so that none is left out.",
            missing=missing,
            twice=twice,
        )


@needs("check_optimizer.check_the_models_own_optimizer_holds_each_parameter_once")
def check_the_models_own_optimizer_decays_matrices(subject: Subject) -> None:
    """Where some parameters decay and others do not, it must not be the biases and gains that do.

    Whether embeddings decay is a choice, and so is it to let all parameters decay.
    """
    groups = met_groups(subject)
    tables = {id(module.weight) for module in groups.model.modules() if isinstance(module, nn.Embedding)}
    named = {n: p for n, p in groups.model.named_parameters() if p.requires_grad and id(p) not in tables}
    decays = {name: groups.decay_of(p) or 0.0 for name, p in named.items()}
    vectors = [name for name, p in named.items() if p.dim() < 2]
    wrongly = [name for name in vectors if decays[name] > 0]
    spared = [name for name, p in named.items() if p.dim() > 1 and not decays[name]]
    note(method=groups.method, decaying=sum(decay > 0 for decay in decays.values()), of=len(decays))
    if wrongly and spared and len(spared) == len(named) - len(vectors):
        fail(
            f"in {groups.method} biases and gains decay, {shortened(wrongly)}, and no matrix does: "
            f"{shortened(spared)}. The two groups are exchanged",
            where=line_of(groups),
            likely=("decay-groups-exchanged",),
            advice="Let matrices decay: p.dim() >= 2 in the group with weight decay, p.dim() < 2 in the one without.",
            wrongly=wrongly,
            spared=spared,
        )


def line_of(groups: Groups) -> Where:
    """Where the method begins."""
    function = inspect.unwrap(getattr(type(groups.model), groups.method))
    code = function.__code__
    return Where(groups.method, type(groups.model).__name__, shown(code.co_filename), code.co_firstlineno)


def check_decay_keeps_to_its_groups(subject: Subject) -> None:
    """With a gradient of 0, weight decay must scale exactly the parameters meant to decay by 1 - rate × decay."""
    needs_trainer(subject)
    model = model_of(subject)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)  # in a bias of 0, decay would not show
    nothing = TrainerRun(subject, model, examples(subject, 2)).trainer.objective

    def without_gradient(network: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        total, count = nothing(network, batch)
        return 0 * total, count

    rate, decay = 0.1, 0.3
    run = TrainerRun(
        subject, model, examples(subject, 2), objective=without_gradient, sgd=False,
        optimizer="adamw", weight_decay=decay, learning_rate=rate,
    )  # fmt: skip
    step = run.step()
    before, after = pieces(model, step.before), pieces(model, step.after)
    decayed = [n for n in before if not torch.equal(before[n], after[n]) and n not in renormalized(model)]
    note(decayed=len(decayed), of=len(before))
    if subject.declared("decay") != "matrices":
        advise(f"{len(decayed)} of {len(before)} parameters decay")
        return
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    meant = [n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables]
    wrongly, spared = [n for n in decayed if n not in meant], [n for n in meant if n not in decayed]
    if wrongly or spared:
        says = [f"{shortened(wrongly)} should not decay"] * bool(wrongly)
        says += [f"{shortened(spared)} should decay"] * bool(spared)
        fail(
            f"{len(decayed)} of {len(before)} parameters decay, expected the {len(meant)} matrices as declared (no "
            f"embeddings, norms or biases): {'; '.join(says)}",
            likely=("norm-alias-in-decay-group", "decay-on-everything"),
            advice="Group parameters by p.dim() >= 2 instead of by a list of norm classes.",
            wrongly=wrongly,
            spared=spared,
        )
    for name in meant:
        shrunk = float((after[name] / before[name]).median())
        if not math.isclose(shrunk, 1 - rate * decay, rel_tol=1e-6):
            fail(
                f"a step with a gradient of 0 scales {name} by {shrunk:.6g}, expected {1 - rate * decay:.6g} "
                "(1 - rate × decay)",
                likely=("decay-twice",),
                advice="Apply weight decay once: in the optimizer or in the loss.",
            )


def check_the_learning_rate_follows_its_schedule(subject: Subject) -> None:
    """The learning rate must follow its schedule (warm-up, then cosine), advancing once per optimizer step."""
    if not subject.brings("trainer"):
        schedule_ticks_once(subject)
        return
    peak, low, warmup, steps = 0.1, 0.01, 3, 9
    run = TrainerRun(
        subject, model_of(subject), examples(subject, 6), batch_size=3, micro_batch_size=1, learning_rate=peak,
        warmup_steps=warmup, schedule="cosine", min_learning_rate=low, steps=steps,
    )  # fmt: skip
    rates: list[float] = []
    step = run.trainer.optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        rates.append(run.trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    run.trainer.optimizer.step = recorded
    for _ in range(steps):
        run.step()

    def closed(i: float) -> float:
        if i < warmup:
            return peak * (i + 1) / warmup
        done = min(1.0, (i - warmup) / (steps - 1 - warmup))
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2

    want = [closed(i) for i in range(steps)]
    off = [i for i, (a, b) in enumerate(zip(rates, want, strict=False)) if not math.isclose(a, b, rel_tol=1e-6)]
    note(rates=[round(rate, 6) for rate in rates])
    if not off and len(rates) == steps:
        return
    often = "the schedule advances 3 times per step, once per micro-batch", ("scheduler-per-microbatch",)
    early = "it is the rate of the next step: the first is skipped", ("scheduler-off-by-one",)
    meanings: list[tuple[str, tuple[str, ...], list[int]]] = [
        (*early, [i + 1 for i in range(steps)]),
        ("it is the rate of the step before", ("scheduler-off-by-one",), [i - 1 for i in range(steps)]),
        *((*often, [3 * i + k for i in range(steps)]) for k in range(4)),
        ("the rate is constant", ("scheduler-never-ticks",), [0] * steps),
    ]

    def same(places: list[int]) -> bool:
        return all(
            math.isclose(x, want[j], rel_tol=1e-6) for x, j in zip(rates, places, strict=False) if 0 <= j < steps
        )

    says, likely = next(((m, k) for m, k, places in meanings if same(places)), ("", ()))
    first = off[0] if off else 0
    fail(
        f"the learning rate of step {first + 1} is {rates[first]:.6g}, expected {want[first]:.6g} (warm-up over "
        f"{warmup} steps, cosine to step {steps})" + (f": {says}" if says else ""),
        likely=likely,
        advice="Set the rate from the number of optimizer steps done, right before optimizer.step().",
        got=rates,
        want=want,
    )


def check_small_updates_survive_low_precision(subject: Subject) -> None:
    """Training in bfloat16 must not round small updates away: keep the weights in float32."""
    needs_trainer(subject)
    window, model = examples(subject, 4), model_of(subject).float()
    run = TrainerRun(
        subject, model, window, sgd=False, batch_size=4, precision="bfloat16", learning_rate=1e-3, weight_decay=0.0
    )
    refuse_low_precision(subject, model)
    first = run.step()
    gradient = pieces(model, at(model, first, Losses(subject, model).mean)[0])
    moved = pieces(model, first.after - first.before)
    largest = max(float(g.abs().max()) for g in gradient.values())
    lost: dict[str, float] = {}
    for name, g in gradient.items():
        live = g.abs() > 1e-3 * largest
        if live.any():
            lost[name] = float((moved[name][live] == 0).double().mean())
    worst = max(lost, key=lambda name: lost[name])
    note(worst=worst, lost=lost[worst])
    if lost[worst] > 0.05:
        names = [name for name in lost if lost[name] > 0.05]
        fail(
            f"{100 * lost[worst]:.0f} % of the entries of {worst} that have a gradient do not change in a step with "
            f"learning rate 1e-3 (the same in {len(names)} of {len(lost)} parameters): the update is rounded away, as "
            f"in bfloat16 weights (this parameter's dtype after the step: "
            f"{str(model.get_parameter(worst).dtype).removeprefix('torch.')})",
            likely=("bf16-master-weights", "norm-weights-frozen-by-dtype"),
            advice="Keep the weights and the optimizer state in float32, and let autocast compute in bfloat16.",
            parameters=names,
        )


def refuse_low_precision(subject: Subject, model: nn.Module) -> None:
    """Raises NotApplicable for a model that does not run under bfloat16 autocast."""
    tokens = subject.tokens(2, 3, seed=subject.seed)
    try:
        with torch.autocast(subject.device.type, torch.bfloat16):
            subject.logits(model, tokens)
    except Exception as error:
        raise NotApplicable("the model does not run under bfloat16 autocast", error=str(error)) from None


# -- optimizers of a file: Adam, Lion, Muon, …

RULE = "check_optimizer.check_an_optimizer_follows_the_rule_of_its_name"
STEPS = 6
CLOSE = 1e-4  # of the way of a parameter: float32 states lose less
SHAPES = ((3, 4), (5,), (2, 3))
SCALES = (1.0, 0.05, 3.0)  # of the gradients of each
EVEN = 3.0  # largest singular value of a step of Muon over its smallest; of the gradient it is 6
HIDDEN = (1e-8, 1e-6, 1e-5, 1e-7, 1e-10, 1e-12, 1e-4, 1e-3)  # eps, where it is no parameter
USUAL = ((0.9, 0.999), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.95, 0.98))  # betas where they are no parameters


def check_an_optimizer_follows_the_rule_of_its_name(subject: Subject) -> None:
    """An optimizer must take a parameter where the published rule of its name takes it."""
    note(judged=judged(subject, "optimizer", judge=lambda one: expect_rule(subject, MetOptimizer(one))))


def expect_rule(subject: Subject, met: MetOptimizer) -> str:
    if met.rule == "muon":
        return expect_orthogonal(subject, met)
    one, start, grads = met.companion, starting(0), gradients(SHAPES[0], STEPS, SCALES[0], 0)
    got = [p for (p,) in run_or_refuse(subject, met, [start], [[g] for g in grads])]
    if any(follows(rule, met, start, grads, got) for rule in RIGHT[met.rule]):
        return met.rule
    if any(follows(rule, met, start, grads, got) for rule in UNSCALED.get(met.rule, ())):
        advise(
            f"the weight decay of {one.name} is not multiplied by the learning rate: a common 0.1 is a tenth per step"
        )
        return met.rule
    if met.others:
        raise NotApplicable(f"it has settings of its own ({', '.join(met.others)}) and is not the published rule")
    hidden = met.unknown & {"lr", *DECIDE.get(met.rule, ("betas",))}
    if hidden:
        raise NotApplicable(f"it chooses {' and '.join(sorted(hidden))} itself")
    found = (
        (says, bug) for says, bug, rules in WRONG[met.rule] if any(follows(r, met, start, grads, got) for r in rules)
    )
    says, bug = next(found, ("", ""))
    paths = [rule(start, grads, met.settings) for rule in RIGHT[met.rule]]
    want = max(paths, key=lambda path: agreeing(path, got, start))
    k = agreeing(want, got, start)
    place = int((got[k] - want[k]).abs().nan_to_num(torch.inf).argmax())
    moved, right = ((p.flatten()[place] - start.flatten()[place]).item() for p in (got[k], want[k]))
    fail(
        f"after {k + 1} step{'s' if k else ''}, {one.name} has moved a weight by {moved:+.4g}, should be {right:+.4g}"
        + (f": {says}" if says else " (the published rule at the same settings)"),
        where=one.where,
        likely=(bug,) if bug else (),
        advice=f"Compare it step by step with torch.optim: {PUBLISHED[met.rule]}.",
        got=moved,
        want=right,
    )


DECIDE = {"rmsprop": ("alpha",), "sgd": (), "adagrad": ()}  # what a rule cannot be known without, beside the rate
PUBLISHED = {
    "adamw": "p *= 1 - lr * weight_decay; p -= lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)",
    "adam": "m and v are means of g and g², p -= lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)",
    "rmsprop": "v = alpha * v + (1 - alpha) * g**2; p -= lr * g / (v.sqrt() + eps)",
    "adagrad": "v += g**2; p -= lr * g / (v.sqrt() + eps)",
    "sgd": "buffer = momentum * buffer + g; p -= lr * buffer",
    "lion": "p -= lr * sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g",
}


def starting(i: int) -> Tensor:
    return torch.linspace(-1, 1.5, math.prod(SHAPES[i]), dtype=torch.float64).view(SHAPES[i])


def run_or_refuse(
    subject: Subject, met: MetOptimizer, starts: list[Tensor], steps: list[list[Any]]
) -> list[list[Tensor]]:
    try:
        return met.run(subject, starts, steps)
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"stepping it raises {said(error)}") from None


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def follows(rule: Rule, met: MetOptimizer, start: Tensor, grads: list[Tensor], got: list[Tensor]) -> bool:
    """Whether the rule takes the parameter the same way, at what was given or, if that is hidden, at usual settings."""
    tried = [met.settings]
    if "eps" in met.unknown:
        tried = [replace(h, eps=eps) for h in tried for eps in HIDDEN]
    if "betas" in met.unknown:
        tried = [replace(h, betas=betas) for h in tried for betas in USUAL]
    return any(all(near(g, w, start) for g, w in zip(got, rule(start, grads, h), strict=True)) for h in tried)


def near(got: Tensor, want: Tensor, start: Tensor) -> bool:
    same = torch.where(got.isnan() & want.isnan(), 0.0, (got.double() - want).abs())
    return bool(same.max() <= CLOSE * (want - start).abs().nan_to_num(0.0).max())


def agreeing(path: list[Tensor], got: list[Tensor], start: Tensor) -> int:
    """How many steps two paths are the same."""
    return next((k for k in range(STEPS) if not near(got[k], path[k], start)), STEPS - 1)


def expect_orthogonal(subject: Subject, met: MetOptimizer) -> str:
    one = met.companion
    for shape in ((6, 6), (8, 5), (5, 8)):
        g, start = well_conditioned(shape, 0), torch.ones(shape)
        ((after,),) = run_or_refuse(subject, met, [start], [[g]])
        step = start - after
        if not step.any() or not step.isfinite().all():
            raise NotApplicable("its step is 0 or not finite")
        values = torch.linalg.svdvals(step.double())
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        along = float(torch.cosine_similarity(step.flatten(), (u @ v).flatten(), 0))
        if float(values[0] / values[-1]) > EVEN or along < 0.9:
            fail(
                f"the singular values of a step of {one.name} for a {shape[0]}×{shape[1]} gradient go from "
                f"{values[-1]:.3g} to {values[0]:.3g}, should be about equal (the gradient's go from 1 to 6)"
                + (f"; its cosine with the orthogonal factor is {along:.2f}" if along < 0.9 else ""),
                where=one.where,
                likely=("muon-does-not-orthogonalize",),
                advice="Divide by the norm, then iterate X = a X + (b A + c A A) X with A = X Xᵀ, five times, on the "
                "transpose of a tall matrix.",
                values=[float(x) for x in values],
            )
    return "orthogonal"


@needs(RULE)
def check_an_optimizer_keeps_its_parameters_apart(subject: Subject) -> None:
    """Each parameter must be moved as it is alone, and one without a gradient not at all."""
    note(judged=judged(subject, "optimizer", judge=lambda one: expect_apart(subject, MetOptimizer(one))))


def expect_apart(subject: Subject, met: MetOptimizer) -> int:
    one, shapes = met.companion, SHAPES if met.rule != "muon" else ((3, 4), (6, 2), (2, 3))
    starts = [torch.linspace(-1, 1.5, math.prod(s), dtype=torch.float64).view(s) for s in shapes]
    grads = [gradients(s, STEPS, scale, i) for i, (s, scale) in enumerate(zip(shapes, SCALES, strict=True))]
    alone = [run_or_refuse(subject, met, [p], [[g] for g in gs])[-1][0] for p, gs in zip(starts, grads, strict=True)]
    shared = (
        "what it keeps of one parameter (moments, or the count of its steps) reaches another. Keep it in "
        "self.state[p], and count steps once a step"
    )
    try:
        together = met.run(subject, starts, [list(g) for g in zip(*grads, strict=True)])[-1]
    except Exception as error:
        fail(
            f"{one.name} steps each of {len(shapes)} parameters alone, but together raises {said(error)}",
            where=one.where,
            likely=("optimizer-shares-its-state",),
            advice=shared[0].upper() + shared[1:] + ".",
        )
    for i, (a, b) in enumerate(zip(alone, together, strict=True)):
        if not near(b, a.double(), starts[i]):
            fail(
                f"{one.name} moves parameter {i} of {len(shapes)} by up to {float((b - starts[i]).abs().max()):.4g} in "
                f"{STEPS} steps together with the others, and by {float((a - starts[i]).abs().max()):.4g} alone",
                where=one.where,
                likely=("optimizer-shares-its-state",),
                advice=shared[0].upper() + shared[1:] + ".",
            )
    try:
        without = met.run(subject, starts, [[g, None, h] for g, _, h in zip(*grads, strict=True)])[-1]
    except Exception as error:
        advise(f"{one.name} stops at a parameter that has no gradient ({said(error)})")
        return len(shapes)
    if not torch.equal(without[1].double(), starts[1]):
        fail(
            f"{one.name} moves a parameter that has no gradient, by up to "
            f"{float((without[1] - starts[1]).abs().max()):.4g} in {STEPS} steps",
            where=one.where,
            likely=("optimizer-decays-without-a-gradient",),
            advice="Skip it before anything else: if p.grad is None: continue.",
        )
    return len(shapes)
