"""Evaluation mode must be deterministic; training mode must drop wherever dropout is declared, and only there."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .expect import READABLE, REPEATS, NotApplicable, advise, expect_close, expect_same, fail, farthest, needs, note
from .probes.expectation import Averaged, means_through, unscaled
from .probes.influence import Item, block_of_tokens, only_training_sees_the_future, some_of
from .probes.module_state import buffers_kept, every_module, frozen, mode_by_design, renormalized
from .probes.padding import real, with_and_without
from .probes.precision import clearly_differ, precise, precision, spread
from .subject import EXISTENCE, Subject
from .watch.calls import first_breaking, first_changing
from .watch.draws import Draws, seeded, states
from .watch.dropout import Site, Trial, is_dropout, reads_mode, set_rates, silent_sites, sites, training_alone
from .watch.location import locate

TRACE = "check_contract.check_earlier_calls_leave_no_trace"
HALF = 0.5  # the rate that keeps as many units as it drops
RATE = 0.3  # the dropout asked for: large enough that every site drops some unit of a small model
ALMOST_NONE = 1e-6  # a rate that hardly ever drops a single unit of a small model
ROWS = 3
SEEDS = (1, 2, 3)
OWN_TRAIN = "Call super().train(mode) for both modes in a train() of your own, and return self."


def _differ(a: Tensor, b: Tensor) -> bool:
    return farthest(a, b) > 0


def _some(subject: Subject, every: list[Item], n: int) -> list[Item]:
    """As many of these places as are affordable; the evidence says so if they are not all."""
    if n < len(every):
        note(sample=f"{n} of {len(every)} places, drawn by the seed: the others were not looked at")
    return some_of(every, n, seed=subject.seed)


def _model(subject: Subject, rate: float = RATE) -> nn.Module:
    """A model whose weights silence no path, as zero-initialized projections would."""
    asked = dict(dropout=rate) if subject.can_vary("dropout") else {}
    return subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=torch.float32, **asked)


def _run(subject: Subject, model: nn.Module, tokens: Tensor, seed: int = 0, mask: Tensor | None = None) -> Tensor:
    kept = buffers_kept(model) if model.training else nullcontext()
    with torch.no_grad(), seeded(subject.seed + seed), kept:
        return subject.logits(model, tokens, mask)


@needs(*READABLE, TRACE)
def check_eval_repeats_itself(subject: Subject) -> None:
    """In evaluation mode the same tokens must give the same logits bit for bit, whatever the random state."""
    model, tokens = _model(subject), block_of_tokens(subject, ROWS)
    for given, mask in with_and_without(subject, tokens):
        again = partial(_run, subject, model, tokens, mask=mask)
        first = again(1)
        drops, likely = _dropping_in_evaluation(subject, model, tokens, mask)
        expect_same(
            again(2),
            first,
            says=f"in evaluation mode two calls with the same tokens {given} give different logits{drops}",
            where=partial(first_breaking, model, partial(again, 1), partial(again, 2), _differ),
            likely=likely,
            advice="Pass training=self.training to every F.dropout, dropout_p=0.0 to attention in evaluation mode, and "
            "make every nn.Dropout in __init__.",
        )


def _dropping_in_evaluation(
    subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None
) -> tuple[str, tuple[str, ...]]:
    """The first dropout that is active in evaluation mode, with its rate and line, and the bugs that do so."""
    attention = "attn-dropout-in-eval"
    likely = ("resid-dropout-in-eval", "dropout-module-built-in-forward", "dropout-in-a-plain-list")
    with seeded(subject.seed), torch.no_grad(), Draws() as draws:
        subject.logits(model, tokens, mask)
    if not draws.dropped:
        return "", (attention, *likely)
    line = f", {draws.line.file}:{draws.line.line}" if draws.line is not None else ""
    first = (attention, *likely) if draws.dropped[0].startswith("scaled") else (*likely, attention)
    return f" ({draws.dropped[0]}{line}, is still active)", first


@needs(*READABLE, REPEATS)
def check_eval_leaves_random_state_alone(subject: Subject) -> None:
    """A forward in evaluation mode must neither draw from nor seed a global random generator."""
    model, tokens = _model(subject), block_of_tokens(subject, ROWS)
    for given, mask in with_and_without(subject, tokens):
        forward = partial(subject.logits, model, tokens, mask)
        with seeded(subject.seed), torch.no_grad():
            forward()  # some models set things up on first use
            torch.manual_seed(subject.seed)
            before = states()
            forward()
            after = states()
            touched = [name for name in before if before[name] != after[name]]
            if not touched:
                continue
            torch.manual_seed(subject.seed + 1)
            fail(
                f"a forward in evaluation mode ({given}) changes the global random state of {', '.join(touched)}: "
                "an evaluation in the middle of a training run changes the rest of the run",
                where=first_changing(model, forward, states),
                likely=("forward-reseeds", "eval-draws-noise", "attn-dropout-in-eval"),
                advice="Draw from a torch.Generator of your own, and only in training mode.",
                generators=touched,
            )


@needs(*READABLE)
def check_forward_leaves_weights_alone(subject: Subject) -> None:
    """A forward must not change any parameter, in evaluation or in training mode."""
    model, tokens = _model(subject), block_of_tokens(subject, ROWS)
    kept = {name: p for name, p in model.named_parameters() if name not in renormalized(model)}
    for mode in (False, True):
        model.train(mode)
        before = {name: value.detach().clone() for name, value in kept.items()}
        buffers = {name: value.detach().clone() for name, value in model.named_buffers()} if not mode else {}
        for _, mask in with_and_without(subject, tokens):
            _run(subject, model, tokens, mask=mask)
        for name, value in kept.items():
            expect_same(
                value,
                before[name],
                says=f"a forward in {'training' if mode else 'evaluation'} mode changes the parameter {name}",
                axes=[f"index {axis}" for axis in range(value.dim())],
                where=lambda: first_changing(model, lambda: _run(subject, model, tokens), lambda: _bytes(kept)),
                likely=("forward-changes-weights",),
                advice="Look for in-place operations on a weight or its .data: only an optimizer may change weights.",
                parameter=name,
            )
        moved = [n for n, v in model.named_buffers() if n in buffers and _differ(v, buffers[n])]
        if moved:
            advise(f"a forward in evaluation mode writes to the buffers {', '.join(moved)}")


def _bytes(parameters: dict[str, nn.Parameter]) -> list[bytes]:
    return [value.detach().cpu().numpy().tobytes() for value in parameters.values()]


@needs(*READABLE)
def check_modes_reach_every_part(subject: Subject) -> None:
    """eval() and train() must set the mode of every module that reads self.training, however the model holds it."""
    model = _model(subject)
    for switch, mode in ((model.eval, False), (model.train, True), (model.eval, False)):
        switch()
        wrong = [name for name, m in every_module(model) if m.training != mode and reads_mode(m) and not frozen(m)]
        if wrong:
            _blame(model, wrong, mode)


def _blame(model: nn.Module, wrong: list[str], mode: bool) -> None:
    called, left = ("train", "evaluation") if mode else ("eval", "training")
    names = dict(model.named_modules())
    hidden = [name for name in wrong if name not in names]
    others = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    fail(
        f"after model.{called}() the module {wrong[0] or type(model).__name__} is still in {left} mode{others}",
        where=None if hidden else locate(model, wrong[0] or type(model).__name__),
        likely=("dropout-in-a-plain-list",) if hidden else ("train-method-forgets-a-part", "dropout-never-on-again"),
        advice="Hold modules in attributes, nn.ModuleList or nn.ModuleDict: PyTorch does not look inside plain lists."
        if hidden
        else OWN_TRAIN,
        modules=wrong,
    )


@needs(*READABLE)
def check_gradient_mode_changes_nothing(subject: Subject) -> None:
    """The logits must be the same with gradients enabled, under no_grad and under inference_mode."""
    model, tokens = precise(subject), block_of_tokens(subject, ROWS)
    for given, mask in with_and_without(subject, tokens):
        forward = partial(subject.logits, model, tokens, mask)
        with torch.enable_grad():
            want = forward().detach()
        for name, context in (("no_grad", torch.no_grad()), ("inference_mode", torch.inference_mode())):
            run = context(forward)
            expect_close(
                real(run().clone(), mask),
                real(want, mask),
                bound=precision(subject).bound(want),
                says=f"under torch.{name}() the logits ({given}) differ from those with gradients enabled",
                where=partial(first_breaking, model, forward, run, clearly_differ),
                likely=("other-scale-without-gradients",),
                advice="Look for torch.is_grad_enabled(), requires_grad, or a fast path taken only without gradients.",
            )


@needs(*READABLE)
def check_training_computes_what_evaluation_does(subject: Subject) -> None:
    """Without dropout, training mode must compute the same logits as evaluation mode."""
    model, tokens = precise(subject), block_of_tokens(subject, ROWS)
    set_rates(model, 0.0)
    want = _run(subject, model, tokens)
    model.train()
    one, two = _run(subject, model, tokens, 1), _run(subject, model, tokens, 2)
    if _differ(one, two):
        raise NotApplicable("with every declared dropout rate at 0, training mode is still random")
    if odd := mode_by_design(model):
        raise NotApplicable(f"{odd} may legitimately compute something else in training mode")

    def run(mode: bool) -> Tensor:
        model.train(mode)
        return _run(subject, model, tokens)

    bound = precision(subject).bound(want)
    leaks = (
        farthest(one, want) > bound.size and subject.causal and only_training_sees_the_future(subject, model, tokens)
    )
    model.train()
    expect_close(
        one,
        want,
        bound=bound,
        says="without dropout, training mode gives different logits than evaluation mode"
        + (": only in training do positions see later tokens" if leaks else ""),
        where=lambda: first_breaking(model, lambda: run(False), lambda: run(True), clearly_differ),
        likely=("causal-mask-dropped-on-a-branch",) if leaks else ("training-scales-embeddings",),
        advice="Pass the causal mask on in training too: with activation checkpointing, as an argument of checkpoint()."
        if leaks
        else "Look for code other than dropout that depends on self.training.",
    )


@needs(*READABLE)
def check_dropout_draws_anew(subject: Subject) -> None:
    """With dropout, training forwards must differ, be repeatable by a global seed, and advance the global generator."""
    model, tokens = _dropping(subject), block_of_tokens(subject, ROWS)
    model.train()
    one, two, one_again = (_run(subject, model, tokens, seed) for seed in (1, 2, 1))
    if not _differ(one, two):
        fail(
            f"with a dropout of {RATE}, two forwards in training mode give the same logits: nothing is dropped, "
            "or always the same units",
            likely=("forward-reseeds", "dropout-never-on-again"),
            advice="Let dropout read self.training, and do not seed the generator inside a forward.",
            sites=[site.name for site in sites(model)],
        )
    expect_same(
        one_again,
        one,
        says="with the same global seed two forwards in training mode differ: a training run cannot be repeated",
        where=lambda: first_breaking(
            model, lambda: _run(subject, model, tokens, 1), lambda: _run(subject, model, tokens, 1), _differ
        ),
        likely=("dropout-from-its-own-generator",),
        advice="Draw dropout masks from PyTorch's global generator.",
    )
    _expect_no_reseeding(subject, model, tokens)


def _dropping(subject: Subject) -> nn.Module:
    model = _model(subject)
    if not sites(model):
        raise NotApplicable("the model declares no dropout: no nn.Dropout, and no attribute such as dropout_p, above 0")
    return model


def _expect_no_reseeding(subject: Subject, model: nn.Module, tokens: Tensor) -> None:
    after = []
    for seed in (1, 2):
        with seeded(subject.seed + seed), torch.no_grad():
            subject.logits(model, tokens)
            after.append(states())
    same = [name for name, state in after[0].items() if state == after[1][name]]
    if same:
        fail(
            f"a forward in training mode seeds the global generator of {', '.join(same)}: whatever is drawn next "
            "(a batch, a dropout mask) is the same after every step",
            likely=("training-forward-reseeds", "forward-reseeds"),
            advice="Remove manual_seed and set_rng_state from the forward.",
        )


@needs(*READABLE, REPEATS)
def check_dropout_obeys_its_rate(subject: Subject) -> None:
    """A dropout of 0 must drop nothing, one of almost 0 almost nothing, and every dropout must keep the mean."""
    _dropping(subject)
    tokens = block_of_tokens(subject, ROWS)
    none = _training(subject, 0.0)
    want = _run(subject, none, tokens, 1)
    if _differ(want, _run(subject, none, tokens, 2)):
        with seeded(0), torch.no_grad(), Draws() as draws:
            subject.logits(none, tokens)
        if not draws.dropped:
            raise NotApplicable("training draws random numbers other than dropout", draws=draws.names)
        fail(
            f"with dropout 0 training still drops: {draws.dropped[0]}",
            where=draws.line,
            likely=("dropout-rate-ignored",),
            advice="Pass the configured rate: F.dropout without p drops half of all units.",
        )
    _expect_no_rate_in_evaluation(subject, tokens)
    little = _training(subject, ALMOST_NONE)
    away = min(float((_run(subject, little, tokens, seed) - want).abs().median()) / spread(want) for seed in SEEDS)
    note(away=away)
    if not away < 0.01:
        fail(
            f"with a dropout of {ALMOST_NONE:g}, half of the logits are {away:.2g} standard deviations or more from "
            "those without dropout, expected less than 0.01: almost nothing is dropped, so the scale must be wrong",
            likely=("dropout-scaled-by-its-rate", "dropout-rate-means-kept"),
            advice="Drop with probability p and multiply what is kept by 1 / (1 - p).",
            away=away,
        )
    _expect_the_mean_kept(subject)


def _expect_no_rate_in_evaluation(subject: Subject, tokens: Tensor) -> None:
    """Not judged if units are dropped by hand: then evaluation may scale down what training does not scale up."""
    model = _model(subject)

    def run(rate: float) -> Tensor:
        set_rates(model.eval(), rate)
        return _run(subject, model, tokens)

    rated, free = run(RATE), run(0.0)
    set_rates(model, RATE)
    with seeded(subject.seed), torch.no_grad(), Draws() as draws:
        subject.logits(model.train(), tokens)
    if draws.names:
        return
    expect_same(
        rated,
        free,
        says=f"in evaluation mode a dropout of {RATE} gives different logits than one of 0, although training "
        "rescales what it keeps",
        where=lambda: first_breaking(model, lambda: run(RATE), lambda: run(0.0), _differ),
        likely=("dropout-scaled-in-evaluation-too",),
        advice="Remove the scaling from evaluation: PyTorch's dropout divides by 1 - p in training.",
    )


def _training(subject: Subject, rate: float) -> nn.Module:
    model = _model(subject, rate)
    set_rates(model, rate)
    return model.train()


def _expect_the_mean_kept(subject: Subject) -> None:
    """Ones through every dropout module: whatever it drops, their mean must stay what evaluation gives."""
    model = _model(subject)
    for site in sites(model):
        means = means_through(subject, model, site) if is_dropout(site.module) else None
        if means is not None and abs(means.trained - means.evaluated) > 6 * means.error + 1e-3:
            fail(
                f"{site.name} changes the mean: an input of ones comes out as {means.trained:.4g} on average in "
                f"training (6 standard errors are {6 * means.error:.2g}) and as {means.evaluated:.4g} in evaluation, "
                f"at a rate of {site.rate:g}",
                where=locate(model, site.name),
                likely=("dropout-without-rescaling",),
                advice="Multiply what is kept by 1 / (1 - p).",
            )


@needs(*READABLE)
def check_every_dropout_site_drops(subject: Subject) -> None:
    """Every module that declares a dropout rate must make the logits random when it alone is in training mode."""
    model = _dropping(subject)
    # several batches: an expert may see no token of one of them
    batches = [block_of_tokens(subject, ROWS, seed=seed) for seed in range(3)]
    trial = Trial(model, lambda tokens, seed: _run(subject, model, tokens, seed), batches)
    every = sites(model)
    cost = 2 * sum(tokens.numel() for tokens in batches)
    silent = silent_sites(trial, _some(subject, every, subject.affordable(cost, len(every), least=4, sweeps=3)))
    if not silent:
        return
    site = silent[0]
    fixed = trial.changed_by(site.module)
    fail(
        f"{site.name or type(model).__name__} declares a dropout of {site.rate:g} but "
        + ("drops the same units on every call" if fixed else "drops nothing in training mode")
        + (f"; so do {', '.join(s.name for s in silent[1:])}" if len(silent) > 1 else ""),
        where=locate(model, site.name or type(model).__name__),
        likely=("dropout-mask-drawn-once",) if fixed else _of_silence(site),
        advice="Call it in forward and use what it returns. In scaled_dot_product_attention, pass "
        "dropout_p=self.dropout if self.training else 0.0.",
        sites=[s.name for s in silent],
    )


def _of_silence(site: Site) -> tuple[str, ...]:
    """The bugs that leave a site without effect."""
    called = ("dropout-call-forgotten", "dropout-result-dropped")
    return ("attention-dropout-not-applied",) if site.functional else called


@needs(*READABLE)
def check_dropout_survives_evaluation(subject: Subject) -> None:
    """After an evaluation, training must drop as it did before."""
    model = _model(subject)
    set_rates(model, RATE)
    before = {site.name: site.rate for site in sites(model)}
    if not before:
        raise NotApplicable("the model declares no dropout")
    model.train()
    _run(subject, model, block_of_tokens(subject, ROWS))
    model.eval()
    _run(subject, model, block_of_tokens(subject, ROWS))
    model.train()
    now = {site.name: site.rate for site in sites(model)}
    lost = [name for name in before if now.get(name) != before[name]]
    if lost:
        fail(
            f"after train(), eval(), train() the dropout rate of {lost[0]} is {now.get(lost[0], 0.0):g}, expected "
            f"{before[lost[0]]:g} as before: regularization ends with the first evaluation",
            where=locate(model, lost[0] or type(model).__name__),
            likely=("dropout-off-forever-after-eval",),
            advice="Do not change dropout rates in eval(): dropout reads self.training by itself.",
            sites=lost,
        )
    again = [_run(subject, model, block_of_tokens(subject, ROWS), seed) for seed in (1, 2)]
    if not _differ(*again):
        fail(
            "after train(), eval(), train() two forwards give the same logits: dropout stays off",
            likely=("dropout-never-on-again", "dropout-off-forever-after-eval"),
            advice=OWN_TRAIN,
        )


@needs(*READABLE)
def check_dropout_differs_between_rows(subject: Subject) -> None:
    """Every row of a batch must get its own dropout mask."""
    model = _dropping(subject)
    tokens = block_of_tokens(subject, ROWS)[:1].repeat(ROWS, 1)
    calm = _run(subject, model, tokens)
    every = [(name, module) for name, module in model.named_modules() if reads_mode(module)]
    few = subject.affordable(len(SEEDS) * tokens.numel(), len(every), least=4, sweeps=3)
    for name, module in _some(subject, every, few):
        try:
            with training_alone(model, module), Draws() as draws:
                runs = [_run(subject, model, tokens, seed) for seed in SEEDS]
        except Exception:  # it returns something else in training mode, which its neighbours do not expect
            continue
        if any(run.shape != calm.shape for run in runs):
            continue
        moved = [run for run in runs if _differ(run, calm)]
        together = moved and all(farthest(run[1:], run[:1].expand_as(run[1:])) == 0 for run in moved)
        if together and draws.shared(module):
            fail(
                f"{name or type(model).__name__} drops the same units in every row of a batch: its mask "
                f"{list(draws.shapes[-1])} has no axis for rows",
                where=locate(model, name or type(model).__name__),
                likely=("dropout-mask-shared-by-rows",),
                advice="Draw the mask in the full shape of the tensor that it multiplies.",
            )


@needs(
    *READABLE,
    "check_modes.check_eval_repeats_itself",
    "check_modes.check_training_computes_what_evaluation_does",
)
def check_dropout_keeps_the_average(subject: Subject) -> None:
    """Averaged over dropout masks, each part must compute in training what it computes in evaluation."""
    rate: dict[str, Any] = dict(dropout=HALF) if subject.can_vary("dropout") else {}
    model, tokens = precise(subject, **rate), block_of_tokens(subject, ROWS)
    set_rates(model, HALF)
    want = _run(subject, model, tokens)

    dropout = Averaged()

    def averaged(mode: bool, seed: int = 1) -> Tensor:
        model.train(mode)
        with dropout:
            return _run(subject, model, tokens, seed)

    one, drawn_again = averaged(True), averaged(True, 2)
    if not dropout.calls and not _differ(one, drawn_again):
        raise NotApplicable("nothing is dropped in training")
    if odd := mode_by_design(model):
        raise NotApplicable(f"{odd} may legitimately compute something else in training mode")
    if not _differ(one, drawn_again):
        expect_close(
            one,
            want,
            bound=precision(subject).bound(want),
            says=f"with each dropout of {HALF:g} replaced by the identity (its average), training gives different "
            "logits than evaluation: the kept entries are rescaled twice, or by another rate",
            where=lambda: first_breaking(model, lambda: averaged(False), lambda: averaged(True), clearly_differ),
            likely=("dropout-rescaled-twice",),
            advice="Remove the extra scaling: PyTorch's dropout already divides by 1 - p.",
        )
        return
    name = unscaled(model.eval(), lambda: _run(subject, model, tokens), precision(subject).bound(want).size)
    if name is None:
        raise NotApplicable("training is random outside PyTorch's dropout, but no mask without rescaling was found")
    fail(
        f"{name} drops entries by a mask of its own and does not rescale the others: at rate p its average output in "
        "training is 1 - p times that in evaluation",
        where=locate(model, name),
        likely=("dropout-by-hand-not-rescaled", "dropout-without-rescaling"),
        advice="Multiply what is kept by 1 / (1 - p).",
    )
