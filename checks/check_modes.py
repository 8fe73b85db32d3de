"""Evaluation mode computes a function and nothing else; training mode drops, everywhere it says so, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .expect import READABLE, REPEATS, NotApplicable, advise, expect_close, expect_same, fail, farthest, needs, note
from .probes.expectation import Averaged, unscaled
from .probes.module_state import buffers_kept, renormalized
from .probes.precision import precise, precision, spread
from .subject import EXISTENCE, Subject
from .watch.calls import first_breaking, first_changing
from .watch.draws import Draws, seeded, states
from .watch.dropout import Site, Trial, is_dropout, reads_mode, set_rates, silent_sites, sites, training_alone
from .watch.location import locate

TRACE = "check_contract.check_earlier_calls_leave_no_trace"
HALF = 0.5  # a rate at which as many are kept as dropped
RATE = 0.3  # the dropout asked for: large enough that no site can miss every unit of a small model
ALMOST_NONE = 1e-6  # a rate at which hardly ever one unit in a small model drops
ROWS = 3
SEEDS = (1, 2, 3)


def _differ(a: Tensor, b: Tensor) -> bool:
    return farthest(a, b) > 0


def _model(subject: Subject, rate: float = RATE) -> nn.Module:
    """Weights that leave no path silent, as zero-initialized projections would."""
    asked = dict(dropout=rate) if subject.can_vary("dropout") else {}
    return subject.amplified(EXISTENCE[1], seed=subject.seed, dtype=torch.float32, **asked)


def _tokens(subject: Subject, seed: int = 0) -> Tensor:
    return subject.tokens(ROWS, subject.sizes.block_size, seed=subject.seed + seed)


def _run(subject: Subject, model: nn.Module, tokens: Tensor, seed: int = 0, mask: Tensor | None = None) -> Tensor:
    kept = buffers_kept(model) if model.training else nullcontext()
    with torch.no_grad(), seeded(subject.seed + seed), kept:
        return subject.logits(model, tokens, mask)


def _masks(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    yield "without a mask", None
    if subject.takes_mask:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[-1, -2:] = False
        yield "with a padding mask", mask


@needs(*READABLE, TRACE)
def check_eval_repeats_itself(subject: Subject) -> None:
    """In evaluation mode the same tokens give the same logits to the bit, whatever the random state."""
    model, tokens = _model(subject), _tokens(subject)
    for given, mask in _masks(subject, tokens):
        again = partial(_run, subject, model, tokens, mask=mask)
        first = again(1)
        drops, likely = _dropping_in_evaluation(subject, model, tokens, mask)
        expect_same(
            again(2),
            first,
            says=f"in evaluation mode two calls with the same tokens {given} give different logits{drops}",
            where=partial(first_breaking, model, partial(again, 1), partial(again, 2), _differ),
            likely=likely,
            advice="every F.dropout needs training=self.training, every dropout_p a 0 in evaluation mode, and every "
            "nn.Dropout must be made in __init__",
        )  # fmt: skip


def _dropping_in_evaluation(
    subject: Subject, model: nn.Module, tokens: Tensor, mask: Tensor | None
) -> tuple[str, tuple[str, ...]]:
    """The first dropout that drops in evaluation mode, with its rate and line, and the bugs that are so."""
    attention = "attn-dropout-in-eval"
    likely = ("resid-dropout-in-eval", "dropout-module-built-in-forward", "dropout-in-a-plain-list")
    with seeded(subject.seed), torch.no_grad(), Draws() as draws:
        subject.logits(model, tokens, mask)
    if not draws.dropped:
        return "", (attention, *likely)
    line = f", {draws.line.file}:{draws.line.line}" if draws.line is not None else ""
    first = (attention, *likely) if draws.dropped[0].startswith("scaled") else (*likely, attention)
    return f" ({draws.dropped[0]}{line}, drops in it)", first


@needs(*READABLE, REPEATS)
def check_eval_leaves_random_state_alone(subject: Subject) -> None:
    """A forward in evaluation mode neither draws from nor seeds a global random generator."""
    model, tokens = _model(subject), _tokens(subject)
    for given, mask in _masks(subject, tokens):
        forward = partial(subject.logits, model, tokens, mask)
        with seeded(subject.seed), torch.no_grad():
            forward()  # whatever is made on first use
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
                "evaluating in the middle of a training run changes the rest of the run",
                where=first_changing(model, forward, states),
                likely=("forward-reseeds", "eval-draws-noise", "attn-dropout-in-eval"),
                advice="draw from a torch.Generator of your own, and in training mode only",
                generators=touched,
            )


@needs(*READABLE)
def check_forward_leaves_weights_alone(subject: Subject) -> None:
    """No forward, in evaluation or training mode, changes a parameter."""
    model, tokens = _model(subject), _tokens(subject)
    kept = {name: p for name, p in model.named_parameters() if name not in renormalized(model)}
    for mode in (False, True):
        model.train(mode)
        before = {name: value.detach().clone() for name, value in kept.items()}
        buffers = {name: value.detach().clone() for name, value in model.named_buffers()} if not mode else {}
        for _, mask in _masks(subject, tokens):
            _run(subject, model, tokens, mask=mask)
        for name, value in kept.items():
            expect_same(
                value,
                before[name],
                says=f"a forward in {'training' if mode else 'evaluation'} mode changes the parameter {name}",
                axes=[f"index {axis}" for axis in range(value.dim())],
                where=lambda: first_changing(model, lambda: _run(subject, model, tokens), lambda: _bytes(kept)),
                likely=("forward-changes-weights",),
                advice="only the optimizer changes parameters; look for in-place operations on a weight or its .data",
                parameter=name,
            )
        moved = [n for n, v in model.named_buffers() if n in buffers and _differ(v, buffers[n])]
        if moved:
            advise(f"a forward in evaluation mode writes to the buffers {', '.join(moved)}")


def _bytes(parameters: dict[str, nn.Parameter]) -> list[bytes]:
    return [value.detach().cpu().numpy().tobytes() for value in parameters.values()]


@needs(*READABLE)
def check_modes_reach_every_part(subject: Subject) -> None:
    """eval() and train() set the mode of every part of the model that has one, however it is held."""
    model = _model(subject)
    for switch, mode in ((model.eval, False), (model.train, True), (model.eval, False)):
        switch()
        wrong = [name for name, m in _reachable(model) if m.training != mode and reads_mode(m) and not _frozen(m)]
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
        advice="hold modules in attributes, nn.ModuleList or nn.ModuleDict: PyTorch does not look into a plain list"
        if hidden
        else "a train() of your own must call super().train(mode) for both modes and return self",
        modules=wrong,
    )


def _frozen(module: nn.Module) -> bool:
    """A part whose weights are all frozen may be kept in evaluation mode."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _reachable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Registered modules, then those that a plain list, tuple or dict of a module hides."""
    registered = dict(model.named_modules())
    yield from registered.items()
    known = {id(module) for module in registered.values()}
    for owner, module in registered.items():
        for attribute in vars(module).keys() - vars(nn.Module()).keys():
            for path, hidden in _modules_in(vars(module)[attribute], f"{owner}.{attribute}".lstrip(".")):
                for name, inner in hidden.named_modules(prefix=path):
                    if id(inner) not in known:
                        known.add(id(inner))
                        yield name, inner


def _modules_in(value: Any, path: str, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _modules_in(item, f"{path}[{key!r}]", depth - 1)
    elif depth and isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _modules_in(item, f"{path}[{index}]", depth - 1)


@needs(*READABLE)
def check_gradient_mode_changes_nothing(subject: Subject) -> None:
    """The logits are the same with gradients recorded, under no_grad and under inference_mode."""
    model, tokens = precise(subject), _tokens(subject)
    for given, mask in _masks(subject, tokens):
        forward = partial(subject.logits, model, tokens, mask)
        with torch.enable_grad():
            want = forward().detach()
        for name, context in (("no_grad", torch.no_grad()), ("inference_mode", torch.inference_mode())):
            run = context(forward)
            expect_close(
                _real(run().clone(), mask),
                _real(want, mask),
                bound=precision(subject).bound(want),
                says=f"under torch.{name}() the logits ({given}) are not those with gradients recorded",
                where=partial(first_breaking, model, forward, run, _clearly_differ),
                likely=("other-scale-without-gradients",),
                advice="look for torch.is_grad_enabled(), requires_grad or a fast path taken only without gradients",
            )


def _clearly_differ(a: Tensor, b: Tensor) -> bool:
    return farthest(a, b) > 1e-5 * spread(a)


def _real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with those of padding set to 0: nothing is said of them."""
    return logits if mask is None else logits.masked_fill(~mask[..., None], 0.0)


@needs(*READABLE)
def check_training_computes_what_evaluation_does(subject: Subject) -> None:
    """Without dropout, training mode and evaluation mode compute the same logits."""
    model, tokens = precise(subject), _tokens(subject)
    set_rates(model, 0.0)
    want = _run(subject, model, tokens)
    model.train()
    one, two = _run(subject, model, tokens, 1), _run(subject, model, tokens, 2)
    if _differ(one, two):
        raise NotApplicable("training mode draws random numbers that no declared rate silences")
    if odd := _mode_by_design(model):
        raise NotApplicable(f"{odd} may compute something else in training mode by design")

    def run(mode: bool) -> Tensor:
        model.train(mode)
        return _run(subject, model, tokens)

    expect_close(
        one,
        want,
        bound=precision(subject).bound(want),
        says="without dropout, training mode computes other logits than evaluation mode",
        where=lambda: first_breaking(model, lambda: run(False), lambda: run(True), _clearly_differ),
        likely=("training-scales-embeddings",),
        advice="look at what depends on self.training beside dropout",
    )


BY_DESIGN = ("expert", "moe", "router", "switch", "gate", "batchnorm", "quant")


def _mode_by_design(model: nn.Module) -> str:
    """A module, by its class's name, of a kind that may legitimately work otherwise in training."""
    for name, module in model.named_modules():
        if reads_mode(module) and any(word in type(module).__name__.lower() for word in BY_DESIGN):
            return f"{name} ({type(module).__name__})"
    return ""


@needs(*READABLE)
def check_dropout_draws_anew(subject: Subject) -> None:
    """With dropout, training forwards differ from one another as the global seed decides, and move its state on."""
    model, tokens = _dropping(subject), _tokens(subject)
    model.train()
    one, two, one_again = (_run(subject, model, tokens, seed) for seed in (1, 2, 1))
    if not _differ(one, two):
        fail(
            f"with a dropout of {RATE} two forwards in training mode give the same logits: nothing is dropped, "
            "or the same units every time",
            likely=("forward-reseeds", "dropout-never-on-again"),
            advice="dropout must see self.training, and nothing may seed the generator inside a forward",
            sites=[site.name for site in sites(model)],
        )
    expect_same(
        one_again,
        one,
        says="with the same global seed two forwards in training mode differ: no training run can be repeated",
        where=lambda: first_breaking(
            model, lambda: _run(subject, model, tokens, 1), lambda: _run(subject, model, tokens, 1), _differ
        ),
        likely=("dropout-from-its-own-generator",),
        advice="draw masks from PyTorch's global generator",
    )
    _expect_no_reseeding(subject, model, tokens)


def _dropping(subject: Subject) -> nn.Module:
    model = _model(subject)
    if not sites(model):
        raise NotApplicable("the model declares no dropout: no nn.Dropout, no attribute like dropout_p above 0")
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
            f"a forward in training mode seeds the global generator of {', '.join(same)}: whatever is drawn after it "
            "(the next batch, the next mask) is the same after every step",
            likely=("training-forward-reseeds", "forward-reseeds"),
            advice="remove manual_seed and set_rng_state from the forward",
        )


@needs(*READABLE, REPEATS)
def check_dropout_obeys_its_rate(subject: Subject) -> None:
    """A dropout of 0 drops nothing, one of almost 0 hardly anything, and what is kept keeps its mean."""
    _dropping(subject)
    tokens = _tokens(subject)
    none = _training(subject, 0.0)
    want = _run(subject, none, tokens, 1)
    if _differ(want, _run(subject, none, tokens, 2)):
        with seeded(0), torch.no_grad(), Draws() as draws:
            subject.logits(none, tokens)
        if not draws.dropped:
            raise NotApplicable("training draws noise that is no dropout", draws=draws.names)
        fail(
            f"with dropout 0 training still drops: {draws.dropped[0]}",
            where=draws.line,
            likely=("dropout-rate-ignored",),
            advice="pass the configured rate; F.dropout without p drops half",
        )
    _expect_no_rate_in_evaluation(subject, tokens)
    little = _training(subject, ALMOST_NONE)
    away = min(float((_run(subject, little, tokens, seed) - want).abs().median()) / spread(want) for seed in SEEDS)
    note(away=away)
    if not away < 0.01:
        fail(
            f"with a dropout of {ALMOST_NONE:g} the logits of half of all tokens are {away:.2g} standard deviations or "
            "more from those without dropout: hardly a unit is dropped, so what is kept has the wrong scale",
            likely=("dropout-scaled-by-its-rate", "dropout-rate-means-kept"),
            advice="drop with probability p and multiply what is kept by 1 / (1 - p)",
            away=away,
        )
    _expect_the_mean_kept(subject)


def _expect_no_rate_in_evaluation(subject: Subject, tokens: Tensor) -> None:
    """Unless units are dropped by hand: then training may leave them as they are, and evaluation scale them down."""
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
        says=f"in evaluation mode a dropout of {RATE} gives other logits than one of 0, although what training keeps "
        "is scaled up already",
        where=lambda: first_breaking(model, lambda: run(RATE), lambda: run(0.0), _differ),
        likely=("dropout-scaled-in-evaluation-too",),
        advice="PyTorch's dropout divides by 1 - p in training: evaluation has nothing to multiply",
    )


def _training(subject: Subject, rate: float) -> nn.Module:
    model = _model(subject, rate)
    set_rates(model, rate)
    return model.train()


CALLS = 256


def _expect_the_mean_kept(subject: Subject) -> None:
    """Ones through every dropout module: whatever it drops, the mean must stay what evaluation gives."""
    model = _model(subject)
    for site in sites(model):
        if not is_dropout(site.module):
            continue
        ones = torch.ones(ROWS, 8, subject.sizes.n_embd, device=subject.device)
        with training_alone(model, site.module), seeded(subject.seed), torch.no_grad():
            answers = torch.stack([site.module(ones) for _ in range(CALLS)])
            evaluated = site.module.eval()(ones)
        if answers.unique().numel() > 2 or evaluated.unique().numel() > 1:
            continue  # no plain mask
        means, kept = answers.flatten(1).double().mean(dim=1), float(evaluated.flatten()[0])
        error = float(means.std()) / CALLS**0.5
        if abs(float(means.mean()) - kept) > 6 * error + 1e-3:
            fail(
                f"{site.name} changes the mean: ones come out as {float(means.mean()):.4g} on average "
                f"in training (6 standard errors are {6 * error:.2g}) and as {kept:.4g} in evaluation, at a rate of "
                f"{site.rate:g}",
                where=locate(model, site.name),
                likely=("dropout-without-rescaling",),
                advice="multiply what is kept by 1 / (1 - p)",
            )


@needs(*READABLE)
def check_every_dropout_site_drops(subject: Subject) -> None:
    """Every module that declares a dropout rate makes the logits random when it alone is in training mode."""
    model = _dropping(subject)
    batches = [_tokens(subject, seed) for seed in range(3)]  # an expert may see no token of one batch
    trial = Trial(model, lambda tokens, seed: _run(subject, model, tokens, seed), batches)
    silent = silent_sites(trial)
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
        advice="call it in forward and use what it returns; pass dropout_p=self.dropout if self.training else 0.0 to "
        "scaled_dot_product_attention",
        sites=[s.name for s in silent],
    )


def _of_silence(site: Site) -> tuple[str, ...]:
    """What may be wrong with a site that drops nothing."""
    called = ("dropout-call-forgotten", "dropout-result-dropped")
    return ("attention-dropout-not-applied",) if site.functional else called


@needs(*READABLE)
def check_dropout_survives_evaluation(subject: Subject) -> None:
    """After an evaluation in between, training drops as before."""
    model = _model(subject)
    set_rates(model, RATE)
    before = {site.name: site.rate for site in sites(model)}
    if not before:
        raise NotApplicable("the model declares no dropout")
    model.train()
    _run(subject, model, _tokens(subject))
    model.eval()
    _run(subject, model, _tokens(subject))
    model.train()
    now = {site.name: site.rate for site in sites(model)}
    lost = [name for name in before if now.get(name) != before[name]]
    if lost:
        fail(
            f"after train(), eval(), train() the dropout rate of {lost[0]} is {now.get(lost[0], 0.0):g}, and was "
            f"{before[lost[0]]:g}: regularization ends with the first evaluation",
            where=locate(model, lost[0] or type(model).__name__),
            likely=("dropout-off-forever-after-eval",),
            advice="eval() must not change rates: dropout looks at self.training by itself",
            sites=lost,
        )
    again = [_run(subject, model, _tokens(subject), seed) for seed in (1, 2)]
    if not _differ(*again):
        fail(
            "after train(), eval(), train() two forwards give the same logits: dropout does not come back",
            likely=("dropout-never-on-again", "dropout-off-forever-after-eval"),
            advice="a train() of your own must call super().train(mode) for both modes and return self",
        )


@needs(*READABLE)
def check_dropout_differs_between_rows(subject: Subject) -> None:
    """Every row of a batch gets a dropout mask of its own."""
    model = _dropping(subject)
    tokens = _tokens(subject)[:1].repeat(ROWS, 1)
    calm = _run(subject, model, tokens)
    for name, module in model.named_modules():
        if not reads_mode(module):
            continue
        try:
            with training_alone(model, module), Draws() as draws:
                runs = [_run(subject, model, tokens, seed) for seed in SEEDS]
        except Exception:  # what it returns depends on the mode, and its neighbours expect the other form
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
                advice="draw the mask in the shape of what it multiplies",
            )


@needs(
    *READABLE,
    "check_modes.check_eval_repeats_itself",
    "check_modes.check_training_computes_what_evaluation_does",
)
def check_dropout_keeps_the_average(subject: Subject) -> None:
    """On average over what is dropped, each part computes in training what it does in evaluation."""
    rate: dict[str, Any] = dict(dropout=HALF) if subject.can_vary("dropout") else {}
    model, tokens = precise(subject, **rate), _tokens(subject)
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
    if odd := _mode_by_design(model):
        raise NotApplicable(f"{odd} may compute something else in training mode by design")
    if not _differ(one, drawn_again):
        expect_close(
            one,
            want,
            bound=precision(subject).bound(want),
            says=f"with a dropout of {HALF:g} that gives its average, its own input, training computes other logits "
            "than evaluation: what is kept is scaled once more, or by another rate",
            where=lambda: first_breaking(model, lambda: averaged(False), lambda: averaged(True), _clearly_differ),
            likely=("dropout-rescaled-twice",),
            advice="PyTorch's dropout divides by 1 - p itself: nothing is left to scale",
        )
        return
    name = unscaled(model.eval(), lambda: _run(subject, model, tokens), precision(subject).bound(want).size)
    if name is None:
        raise NotApplicable("training draws random numbers beside PyTorch's dropout, and no mask of them only silences")
    fail(
        f"{name} silences entries by a mask of its own and leaves the others as they are: at a rate of p what it gives "
        "in training is on average 1 - p times what it gives in evaluation",
        where=locate(model, name),
        likely=("dropout-by-hand-not-rescaled", "dropout-without-rescaling"),
        advice="multiply what is kept by 1 / (1 - p)",
    )
