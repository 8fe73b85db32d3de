"""Times a subject's training step and decoding beside the reference and bare matrix products, in the same rounds.

Run by `pytest --gpu` or by naming this file (`pytest checks/bench_training.py --model model.py --benchmark-json=f`),
never by a plain `pytest`. All measurements are in each benchmark's `extra_info`.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..transformer.loss import next_token_loss
from . import reference as ours
from .expect import NotApplicable
from .probes.loads import (
    AXES,
    SMALL,
    TEN,
    Load,
    compiler_missing,
    decoding_products,
    extent,
    loads_of,
    sized,
    too_large,
    training_products,
)
from .probes.timing import Marks, Runs, growth, in_turn, ratio, timed
from .subject import Subject
from .watch.memory import peak_bytes

ROUNDS, FEW = 20, 5  # of steps of small and of large loads
LONG_ENOUGH = 64  # positions for a slope over them to mean something
pytestmark = pytest.mark.filterwarnings("ignore")  # compilers' and subjects' warnings are not ours
Tell = Callable[[str], None]
Refuse = Callable[..., None]
TYPES = {"eager": torch.float32, "bfloat16": torch.bfloat16, "compiled": torch.float32}


class Step:
    """One training step of a model. `parts` has the seconds of forward (with loss), backward and optimizer per step."""

    def __init__(self, subject: Subject, load: Load, how: str = "eager") -> None:
        self.subject, self.dtype, self.device = sized(subject, load), TYPES[how], subject.device
        self.model = self.subject.build().train()
        if how == "compiled":
            torch.compiler.reset()  # another size is a new program, not a recompilation
            self.model.compile()
        self.tokens, self.targets = self.subject.tokens(2 * load.B, load.T).chunk(2)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.parts: list[dict[str, float]] = []

    def __call__(self) -> None:
        marks = Marks(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = next_token_loss(self.subject.logits(self.model, self.tokens), self.targets)
        marks.mark("forward")
        torch.autograd.backward(loss)
        marks.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.mark("optimizer")
        self.parts.append(marks.seconds())

    def median_parts(self, rounds: int) -> dict[str, float]:
        latest = self.parts[-rounds:]
        return {name: statistics.median(part[name] for part in latest) for name in latest[0]}

    def peak_bytes(self) -> int:
        """Peak memory of one step beyond weights and optimizer state: activations and gradients."""
        return peak_bytes(self, self.device)


# -- what pytest gives a benchmark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each subject at each of its sizes."""
    subjects = plugin(metafunc.config).subjects
    if "load" in metafunc.fixturenames:
        pairs = [(subject, load) for subject in subjects for load in loads_of(subject)]
        ids = [f"{subject.name}-{load}" for subject, load in pairs]
        metafunc.parametrize(("subject", "load"), pairs, ids=ids)
    else:
        metafunc.parametrize("subject", subjects, ids=lambda subject: subject.name)


def plugin(config: pytest.Config) -> Any:
    return config.pluginmanager.get_plugin("transformer-checks-run")


@pytest.fixture
def reference(subject: Subject) -> Subject:
    """The reference model, loaded as a student's file is, on the subject's device."""
    return ours.reference(device=str(subject.device))


@pytest.fixture
def patient(request: pytest.FixtureRequest, subject: Subject) -> bool:
    """Whether benchmarks that take minutes on a CPU may run."""
    return subject.device.type != "cpu" or bool(plugin(request.config).options.get("slow"))


@pytest.fixture
def tell(request: pytest.FixtureRequest, subject: Subject) -> Tell:
    """Adds a line to the end of the run."""
    return lambda line: request.node.user_properties.append(("benchmark", f"{subject.name}, {line}"))


@pytest.fixture
def refuse(request: pytest.FixtureRequest, subject: Subject, patient: bool) -> Refuse:
    """Skips a load that would take minutes, does not fit or cannot be compiled; the end of the run says so."""

    def refuse(load: Load, how: str = "eager") -> None:
        why = why_not(load, how, subject.device, patient)
        if why is not None:
            request.node.user_properties.append(("no benchmark", why))
            pytest.skip(why)

    return refuse


def why_not(load: Load, how: str, device: torch.device, patient: bool) -> str | None:
    if device.type == "meta":
        return "the meta device computes nothing"
    if not patient and (load.large or how != "eager"):
        return "larger sizes, bfloat16 and compiled steps run on a CPU only with --slow"
    if how == "compiled" and (missing := compiler_missing(device)):
        return f"compiled steps are not run: {missing}"
    if missing := too_large(load, device):
        return f"{load} is not run: {missing}"
    return None


@contextmanager
def theirs(subject: Subject) -> Iterator[None]:
    """Reports an error of the subject in one line, with its own file and line instead of our traceback."""
    try:
        yield
    except NotApplicable as reason:
        pytest.skip(reason.reason)
    except Exception as error:
        lines = [f for f in traceback.extract_tb(error.__traceback__) if subject.owns(f.filename)]
        if not lines:
            raise
        says = f"{lines[-1].filename}:{lines[-1].lineno}: {type(error).__name__}: {error}"
        raise pytest.fail.Exception(says, pytrace=False) from None


# -- benchmarks


@pytest.mark.parametrize("how", TYPES)
def bench_training_step(
    benchmark: Any, subject: Subject, reference: Subject, tell: Tell, refuse: Refuse, load: Load, how: str
) -> None:
    """The time of a step relative to the reference and to its matrix products, and its peak memory."""
    refuse(load, how)
    rounds = FEW if load.large else ROUNDS
    with theirs(subject):
        mine = Step(subject, load, how)
        step = Step(reference, load, how)
        products = training_products(load.sizes, load.B, load.T, device=subject.device, dtype=TYPES[how])
        seconds = measured(
            benchmark, {"subject": mine, "reference": step, "products": products}, subject.device, rounds
        )
        held = {name: of.peak_bytes() for name, of in (("subject", mine), ("reference", step)) if how != "compiled"}
    multiple, share = ratio(seconds["subject"], seconds["reference"]), ratio(seconds["products"], seconds["subject"])
    speed = load.tokens / statistics.median(seconds["subject"])
    benchmark.extra_info.update(
        sizes=asdict(load.sizes),
        batch=load.B,
        parameters=sum(p.numel() for p in mine.model.parameters()),
        tokens_a_second=speed,
        of_the_reference=asdict(multiple),
        share_of_the_products=asdict(share),
        parts={"subject": mine.median_parts(rounds), "reference": step.median_parts(rounds)},
        peak_bytes=held,
    )
    parts = ", ".join(f"{name} {part * 1e3:.3g}" for name, part in mine.median_parts(rounds).items())
    memory = f"; {held['subject'] / 2**20:.3g} MiB beyond weights and optimizer" if held else ""
    tell(
        f"step of {load}, {how}: {speed:,.0f} token/s, {multiple} × the reference's time, "
        f"matrix products {share.median:.0%} of it; ms: {parts}{memory}"
    )


@pytest.mark.parametrize("axis", AXES)
def bench_growth(benchmark: Any, subject: Subject, reference: Subject, tell: Tell, refuse: Refuse, axis: str) -> None:
    """The exponent with which the time of a step grows with length, batch size, width and depth."""
    letter, loads = AXES[axis]
    refuse(loads[0])
    runs: dict[str, Callable[[], object]] = {}
    with theirs(subject):
        for load in loads:
            for name, of in (("subject", subject), ("reference", reference)):
                runs[f"{name} {extent(axis, load)}"] = Step(of, load)
            products = training_products(load.sizes, load.B, load.T, device=subject.device)
            runs[f"products {extent(axis, load)}"] = products
        seconds = together(benchmark, runs, FEW, subject.device)
    sizes = [extent(axis, load) for load in loads]
    rounds = {
        name: list(zip(*(seconds[f"{name} {size}"] for size in sizes), strict=True))
        for name in ("subject", "reference", "products")
    }
    powers = {name: growth(sizes, of) for name, of in rounds.items()}
    benchmark.extra_info.update(
        sizes=sizes,
        seconds={name: [statistics.median(times) for times in zip(*of, strict=True)] for name, of in rounds.items()},
        exponents={name: asdict(power) for name, power in powers.items()},
    )
    tell(
        f"{axis} {sizes[0]} to {sizes[-1]}: a step takes {letter}^{powers['subject'].median:.2f} "
        f"[{powers['subject'].low:.2f}, {powers['subject'].high:.2f}], the reference's "
        f"{letter}^{powers['reference'].median:.2f}, matrix products {letter}^{powers['products'].median:.2f}"
    )


@pytest.mark.parametrize("cache", ["cached", "uncached"])
def bench_decoding(
    benchmark: Any, subject: Subject, reference: Subject, tell: Tell, refuse: Refuse, patient: bool, cache: str
) -> None:
    """Time per token by position, for both models token by token in turn; constant with a cache."""
    load = loads_of(subject, (TEN if patient else SMALL,))[0]
    refuse(load)
    with theirs(subject), torch.no_grad():
        runs: dict[str, Callable[[], object]] = {
            "subject": reader(subject, load, cache == "cached"),
            "reference": reader(reference, load, cache == "cached"),
            "products": decoding_products(load.sizes, device=subject.device),
        }
        seconds = together(benchmark, runs, load.T, subject.device, warmup=0)
    steady = {name: times[load.T // 8 :] for name, times in seconds.items()}  # the first tokens warm up
    slopes = {name: slope(times) for name, times in steady.items()}
    multiple, share = ratio(steady["subject"], steady["reference"]), ratio(steady["products"], steady["subject"])
    speed = 1 / statistics.median(steady["subject"])
    benchmark.extra_info.update(
        seconds_a_token=seconds,
        growth_over_the_block=slopes,
        tokens_a_second=speed,
        of_the_reference=asdict(multiple),
        share_of_the_products=asdict(share),
    )
    grows = f"from the first token to number {load.T} the time per token changes by {slopes['subject']:+.0%}"
    grows += f" (reference {slopes['reference']:+.0%})"
    tell(
        f"decoding {load}, {cache}: {speed:,.0f} token/s, {multiple} × the reference's time, matrix-vector products "
        f"{share.median:.0%} of it; {grows if load.T >= LONG_ENOUGH else f'{load.T} positions are too few for a slope'}"
    )


def reader(subject: Subject, load: Load, cached: bool) -> Callable[[], Tensor]:
    """Reads one more token at each call: that token alone with a cache, the whole text so far without."""
    subject = sized(subject, load)
    model, tokens = subject.build(), subject.tokens(1, load.T)
    cache, t = subject.new_cache(model, 1) if cached else None, 0
    if cached and cache is None:
        raise NotApplicable("the model has no key-value cache that is known here")

    def read() -> Tensor:
        nonlocal t
        t += 1
        if cached:
            return subject.logits(model, tokens[:, t - 1 : t], None, cache)
        return subject.logits(model, tokens[:, :t])

    return read


def slope(seconds: list[float]) -> float:
    """The growth of the time per token from first to last, relative to the first, along a fitted line.

    Fitted to the medians of eighths, so that no single delay bends it.
    """
    eighths = [float(np.median(part)) for part in np.array_split(np.asarray(seconds), 8)]
    per_eighth, first = np.polyfit(np.arange(8), eighths, 1)
    return float(7 * per_eighth / first)


# -- measuring


def measured(
    benchmark: Any, runs: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Runs everything once per round; pytest-benchmark itself times the subject."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    others: Runs = {name: run for name, run in runs.items() if name != "subject"}

    def once() -> None:
        seconds["subject"].append(timed(runs["subject"], device))

    def the_others() -> None:
        for name, times in in_turn(others, 1, warmup=0, device=device).items():
            seconds[name] += times

    for run in runs.values():  # the first calls compile, and allocate
        run()
        run()
    benchmark.pedantic(once, setup=the_others, rounds=rounds)
    return seconds


def together(
    benchmark: Any, runs: Runs, rounds: int, device: torch.device, *, warmup: int = 1
) -> dict[str, list[float]]:
    """All rounds of all runs as a single round of pytest-benchmark, whose own figure then means little."""
    seconds: dict[str, list[float]] = benchmark.pedantic(
        in_turn, args=(runs, rounds), kwargs=dict(warmup=warmup, device=device), rounds=1
    )
    return seconds
