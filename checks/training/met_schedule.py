"""How to ask a foreign schedule for its learning rates, and what it declares: warm-up, last step, maximum, minimum.

A `MetSchedule` gives the rate of each step. Where a parameter asks for a length or a rate it gets a small one of ours;
otherwise the numbers are those that the file itself has under such names. Nothing here judges.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..expect import NotApplicable
from ..meet.companions import STEPS, words_of
from ..meet.vocabulary import squash, words
from ..probes.filled import called, roles_of
from ..subject import Companion, Subject

NAMES = {
    "optimizer": "optimizer opt optim",
    "config": "config cfg conf args hparams hp train_config train_cfg training_args training_config hyperparameters",
    "warmup": "warmup warmup_steps warmup_iters warmup_iterations warmup_iter warmup_step warmup_epochs warmup_period "
    "warmup_batches n_warmup n_warmup_steps num_warmup num_warmup_steps num_warmup_iters lr_warmup_steps warmup_t "
    "lr_warmup_iters ramp_up_steps rampup_steps linear_warmup_steps warm_steps t_w warm_up_epochs num_warmup_epochs",
    "total": "total total_steps total_iters total_iterations total_epochs total_training_steps num_training_steps "
    "max_steps max_iters max_iterations max_epochs max_iter max_step max_num_iters num_steps num_iters num_iterations "
    "num_epochs n_steps n_iters n_epochs steps iters iterations epochs t_max train_steps train_iters training_steps "
    "training_iters all num_train_steps last_step final_step end_step lr_decay_iters lr_decay_steps cosine_cycle_iters "
    "cosine_steps num_training_iters total_train_steps n_training_steps total_num_steps "
    "total_step final_iter final_iters cosine_annealing_iters annealing_iters t_c",
    "decay": "decay_steps decay_iters num_decay_steps decay_iterations n_decay_steps",
    "tail": "cooldown_steps cooldown_iters warmdown_steps warmdown_iters anneal_steps cooldown warmdown",
    "stable": "stable_steps num_stable_steps stable_iters n_stable_steps hold_steps constant_steps stable",
    "peak": "max_lr peak_lr lr_max lr_peak lr learning_rate base_lr max_learning_rate peak_learning_rate target_lr "
    "base_learning_rate lr_base alpha_max a_max eta_max",
    "least": "min_lr lr_min eta_min final_lr end_lr lr_end lr_final min_learning_rate final_learning_rate "
    "end_learning_rate minimum_lr lr_floor alpha_min a_min min_learning_rate",
    "ratio": "min_lr_ratio min_ratio final_lr_ratio lr_min_ratio final_lr_frac min_lr_frac min_factor final_ratio "
    "min_lr_factor min_lr_mult min_frac final_frac min_lr_scale end_factor lr_min_factor min_mult min_lr_rate",
    "initial": "init_lr initial_lr start_lr lr_init lr_start warmup_init_lr warmup_start_lr initial_learning_rate",
    "warmup share": "warmup_ratio warmup_frac warmup_fraction warmup_pct warmup_proportion pct_start",
    "tail share": "decay_frac decay_ratio decay_fraction cooldown_frac cooldown_ratio cooldown_fraction warmdown_ratio "
    "warmdown_frac",
    "width": "d_model model_size dim_model embed_dim n_embd hidden_size model_dim dim",
    "scale": "factor scale multiplier lr_mul lr_mult lr_scale",
    "power": "power exponent",
    "ignored": "verbose last_epoch",
}
ROLES = {squash(word): role for role, text in NAMES.items() for word in text.split()}
WARMUP, TOTAL, TAIL, STABLE = 12, 100, 20, 40  # steps, of schedules that can be told
PEAK, LEAST = 1e-3, 1e-4
GIVEN: dict[str, float] = {
    "warmup": WARMUP, "total": TOTAL, "decay": TAIL, "tail": TAIL, "stable": STABLE, "peak": PEAK, "least": LEAST,
    "ratio": LEAST / PEAK, "initial": 0.0, "warmup share": WARMUP / TOTAL, "tail share": TAIL / TOTAL,
    "width": 64, "scale": 1.0, "power": 1.0,
}  # fmt: skip
ALWAYS = words("optimizer config warmup total decay tail stable peak least ratio step") | {"warmup share", "tail share"}
OF_THE_STEP = ("__call__", "get_lr", "lr", "rate", "get_rate", "learning_rate", "get_learning_rate", "lr_at", "value")
RESTARTS = words(
    "restart restarts cycle cycles cyclic cyclical sgdr triangular chebyshev fractal wave sine zigzag rewarm"
)
RATE_WORDS = words("lr learning warmup noam wsd cosine linear decay annealing")
STEPPERS = ("step", "step_and_update_lr", "update_lr", "update_learning_rate")
MOST = 20_000  # calls of step() that a check waits for


@dataclass
class Declared:
    """What the names of a schedule's numbers say; None where no name says it. Lengths in steps."""

    warmup: float | None = None
    ends: tuple[float, ...] = ()  # the steps at which it may end, by either meaning of a name such as decay_steps
    goes_on: bool = False  # whether the name says that the decay ends there, not the training
    peak: float | None = None
    least: float | None = None
    ratio: float | None = None  # of the minimum to the maximum
    names: dict[str, str] = field(default_factory=dict)  # role to the name that declares it

    def name(self, role: str) -> str:
        return self.names.get(role, role)

    @property
    def names_a_maximum(self) -> bool:
        """Whether the name of the peak says that no rate is higher: max_lr does, lr may be what others are based on."""
        return bool(words("max maximum peak") & words_of(self.name("peak")))


@dataclass
class MetSchedule:
    """A schedule, what it declares and the rates that it gives."""

    companion: Companion
    declared: Declared
    rates: dict[int, float]  # by step, in order
    restarts: bool
    cosine: bool

    def near(self, step: float, reach: int = 1) -> dict[int, float]:
        return {k: v for k, v in self.rates.items() if abs(k - step) <= reach}

    @property
    def end(self) -> float:
        """The last declared step; infinite where none is declared."""
        return max(self.declared.ends, default=math.inf)

    @property
    def spoken(self) -> float:
        """The last step of which its names speak: its end, or else that of its warm-up."""
        return self.end if self.declared.ends else max(self.declared.warmup or 0.0, 2.0) - 1

    @property
    def top(self) -> float:
        """The highest rate until the end."""
        return max(v for k, v in self.rates.items() if k <= self.end)

    @property
    def least(self) -> float | None:
        """The declared minimum, as a rate."""
        ratio = self.declared.ratio
        return self.top * ratio if self.declared.least is None and ratio is not None else self.declared.least


def met_schedule(subject: Subject, companion: Companion) -> MetSchedule:
    """What it declares and gives. Raises NotApplicable if no way to call it was found."""
    return subject.once(_met, companion)


def roles(function: Callable[..., Any]) -> dict[str, str]:
    """The role of each parameter, that of the step included."""
    found = roles_of(function, NAMES)
    steps = [n for n in found if (not found[n] or n == "steps") and words_of(n) and words_of(n) <= STEPS and n != "T"]
    steps = steps or [n for n in ("n", "x") if n in found]
    if "steps" in steps and len(steps) > 1:
        steps.remove("steps")  # how many there are
    return {n: "total" if n == "T" else "step" if n in steps[:1] else role for n, role in found.items()}


class Asked:
    """A configuration that has whatever is asked for under a name of which the meaning is known, and remembers it."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def __getattr__(self, name: str) -> float:
        role = ROLES.get(squash(name), "")
        if role not in GIVEN:
            raise AttributeError(name)
        self.names[role] = name
        return number(role)

    def __getitem__(self, name: str) -> float:
        try:
            return float(getattr(self, name))
        except AttributeError:
            raise KeyError(name) from None


def number(role: str) -> float:
    value = GIVEN[role]
    return value if isinstance(value, int) else float(value)


def an_optimizer() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    return torch.optim.SGD([parameter], lr=PEAK)


def _met(subject: Subject, companion: Companion) -> MetSchedule:
    with warnings.catch_warnings(), subject.running():
        warnings.simplefilter("ignore")
        return _asked(companion)


def _asked(companion: Companion) -> MetSchedule:
    value, found = companion.value, roles(companion.value)
    config, optimizer = Asked(), an_optimizer()
    parameters = inspect.signature(value).parameters
    given = {
        role for name, role in found.items() if role in ALWAYS or parameters[name].default is inspect.Parameter.empty
    }
    values: dict[str, Any] = {role: number(role) for role in given if role in GIVEN}
    if "decay" in values and not given & {"stable", "total"}:
        values["decay"] = TOTAL
    if "initial" in values and "peak" not in values:
        values["initial"] = PEAK
    values |= {"optimizer": optimizer, "config": config}
    names = {role: name for name, role in found.items() if role in values}
    named = words_of(companion.name)
    if named & words("cooldown warmdown") and not named & words("warmup wsd schedule scheduler stable"):
        raise NotApplicable("its name says that it gives the end of a schedule alone")
    by_step = inspect.isfunction(value) and "step" in found.values()
    if not by_step and "optimizer" not in found.values() and not named & RATE_WORDS:
        raise NotApplicable("it takes no optimizer, and its name does not say that it schedules a learning rate")
    try:
        made = value if by_step else called(value, found, values)
        rate = _by_step(value, found, values, optimizer) if by_step else _of_made(made, values, optimizer)
        rate([1, 2 * WARMUP, TOTAL - 1])
    except NotApplicable:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:120]
        raise NotApplicable(f"calling it raises {type(error).__name__}: {said}") from None
    own = isinstance(made, torch.optim.lr_scheduler.LRScheduler)
    declared = _declared(value, names | config.names, values, own and not set(found.values()) & {"peak", "scale", ""})
    if declared.warmup is None and not declared.ends:
        raise NotApplicable("neither its warm-up nor its last step is declared by a name that is known")
    read = names_read(value)
    unnamed = {word for name in read | set(found) | {companion.name} if squash(name) not in ROLES
               for word in words_of(name)}  # fmt: skip
    halves = next((p.default for n, p in parameters.items() if squash(n) in ("numcycles", "cycles")), None)
    restarts = bool(
        {"t0", "tmult"} & {squash(name) for name in found}
        or unnamed & (RESTARTS - (words("cycle cycles") if _at_most_half(halves) else set()))
    )
    cosine = bool({"cos", "cosine", "CosineAnnealingLR"} & (read | named))
    end, steps = max(declared.ends, default=math.inf), _steps(declared)
    rates = rate([k for k in steps if k <= end])
    with contextlib.suppress(Exception):  # some refuse to be asked for more
        rates |= rate([k for k in steps if k > end] or [1])
    return MetSchedule(companion, declared, rates, restarts, cosine)


def _at_most_half(value: Any) -> bool:
    return isinstance(value, float) and value <= 0.5


def _steps(declared: Declared) -> list[int]:
    """Every step of a short schedule and a fifth beyond its end, the telling ones of a long one."""
    warmup = math.ceil(declared.warmup or 0)
    end = math.ceil(max(declared.ends, default=max(10 * warmup, 100)))
    beyond = end + max(end // 5, 3)
    if beyond <= 2000:
        return list(range(beyond + 1))
    near = (k + d for k in (0, warmup, *map(math.ceil, declared.ends), beyond) for d in range(-4, 5))
    even = (beyond * i // 400 for i in range(401))
    return sorted({k for k in (*near, *even) if 0 <= k <= beyond})


# -- calling it

Rate = Callable[[Sequence[int]], dict[int, float]]


def _by_step(function: Callable[..., Any], found: Mapping[str, str], values: Mapping[str, Any], optimizer: Any) -> Rate:
    """Of a function, or method, that takes the step: what it returns, or else what it sets in the optimizer."""

    def at(step: int) -> float | None:
        returned: float | None = called(function, found, {**values, "step": step})
        return float(optimizer.param_groups[0]["lr"]) if returned is None else returned

    return lambda steps: dict(_each(at, steps))


def _required(function: Callable[..., Any], name: str) -> bool:
    return inspect.signature(function).parameters[name].default is inspect.Parameter.empty


def _each(at: Callable[[int], Any], steps: Sequence[int]) -> Iterator[tuple[int, float]]:
    for step in steps:
        try:
            yield step, _number(at(step))
        except ZeroDivisionError:
            if step:
                raise  # at 0 it is not meant to be asked: the steps of Noam's count from 1


def _number(value: Any) -> float:
    if isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if isinstance(value, bool) or not (isinstance(value, int | float) or getattr(value, "ndim", 1) == 0):
        raise NotApplicable(f"it returns {type(value).__name__}, not a learning rate")
    return float(value)


def _of_made(made: Any, values: Mapping[str, Any], optimizer: Any) -> Rate:
    """Of what a class or a factory made: a function of the step, a table of rates, or something that steps."""
    if not isinstance(made, type(None) | str | Mapping) and hasattr(made, "__getitem__") and hasattr(made, "__len__"):
        last = len(made) - 1
        return lambda steps: {k: _number(made[k]) for k in steps if k <= last}
    if inspect.isroutine(made):
        needed = [name for name in roles(made) if _required(made, name)]
        return _by_step(made, _takes_the_step(made) or dict.fromkeys(needed[:1], "step"), values, optimizer)
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        for name in OF_THE_STEP:
            method = getattr(made, name, None)
            if callable(method) and (found := _takes_the_step(method)):
                return _by_step(method, found, values, optimizer)
    step = next((method for name in STEPPERS if callable(method := getattr(made, name, None))), None)
    if step is None:
        raise NotApplicable("no way to ask it for a learning rate was found")
    return _stepping(made, step, optimizer)


def _takes_the_step(method: Callable[..., Any]) -> dict[str, str]:
    try:
        found = roles(method)
    except NotApplicable:
        return {}
    needed = [role for name, role in found.items() if _required(method, name)]
    fits = "step" in found.values() and all(role in ("step", "optimizer") for role in needed)
    return found if fits else {}


def _stepping(made: Any, step: Callable[..., Any], optimizer: Any) -> Rate:
    """The rates that the optimizer has after each call of step(): PyTorch's protocol, and that of wrappers."""
    found, counted = roles(step), isinstance(made, torch.optim.lr_scheduler.LRScheduler)
    history: list[float] = []

    def read(returned: Any) -> float:
        rate = optimizer.param_groups[0]["lr"]
        if isinstance(returned, int | float) and not isinstance(returned, bool) and rate == PEAK:
            return float(returned)
        getter = getattr(made, "get_lr", None)
        if rate == PEAK and not counted and callable(getter) and not inspect.signature(getter).parameters:
            return _number(getter())
        return float(rate)

    def rates(steps: Sequence[int]) -> dict[int, float]:
        if max(steps) > MOST:
            raise NotApplicable(f"it would have to be stepped {max(steps)} times")
        if not history:
            history.append(read(None) if counted else math.nan)  # before the first step() only PyTorch's own have one
        while len(history) <= max(steps):
            optimizer.step()
            returned = called(step, found, {"step": len(history), "optimizer": optimizer})
            history.append(read(returned))
        return {k: history[k] for k in steps if not (k == 0 and not counted)}

    return rates


# -- what it declares


def names_read(value: Any) -> set[str]:
    """The names that the code of a function, or of a class's methods, reads; keys of configurations included."""
    found: set[str] = set()
    for code in _codes(value):
        found |= {*code.co_names, *code.co_varnames, *code.co_freevars}
        found |= {c for c in code.co_consts if isinstance(c, str) and re.fullmatch(r"\w{2,30}", c)}
    return found


def _codes(value: Any) -> Iterator[types.CodeType]:
    functions = [f for f in vars(value).values() if inspect.isfunction(f)] if inspect.isclass(value) else [value]
    waiting = [f.__code__ for f in (inspect.unwrap(one) for one in functions) if inspect.isfunction(f)]
    for code in waiting:
        yield code
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def _globals_read(value: Any) -> dict[str, Any]:
    """Numbers of the file that a function reads, by name; of configurations, those attributes that it reads."""
    function = (
        next((f for f in vars(value).values() if inspect.isfunction(f)), None) if inspect.isclass(value) else value
    )
    scope, read = getattr(function, "__globals__", {}), names_read(value)
    found: dict[str, Any] = {}
    for name in read & set(scope):
        held = scope[name]
        if inspect.ismodule(held) or inspect.isroutine(held):
            continue
        for key in read - {name}:
            inner = held.get(key) if isinstance(held, Mapping) else getattr(held, key, None)
            if _is_number(inner):
                found[key] = inner
        if _is_number(held):
            found[name] = held
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _declared(value: Any, names: dict[str, str], values: Mapping[str, Any], scales: bool) -> Declared:
    told = {role: [values.get(role, number(role))] for role in names if role in GIVEN}
    parameters = inspect.signature(value).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in names.values()}
    for found in (defaults, _globals_read(value)):
        known = set(told)
        for name, held in sorted(found.items()):
            role = ROLES.get(squash(name), "")
            if role in GIVEN and role not in known and _is_number(held):
                told.setdefault(role, []).append(float(held))
                names[role] = name
    ends = told.get("total", [])
    one = {role: numbers[0] for role, numbers in told.items() if len(set(numbers)) == 1}
    declared = Declared(one.get("warmup"), names=names, least=one.get("least"), ratio=one.get("ratio"))
    declared.goes_on = "decay" in squash(names.get("total", "")) and bool(ends)
    if not ends and "stable" in one and {"tail", "decay"} & one.keys():
        ends = [one.get("warmup", 0.0) + one["stable"] + one.get("tail", one.get("decay", 0.0))]
    elif not ends and "decay" in one:
        ends, declared.goes_on = [one["decay"], one["decay"] + one.get("warmup", 0.0)], True
        names["total"] = names["decay"]
    declared.ends = tuple(dict.fromkeys(ends))
    if declared.warmup is None and "warmup share" in one and ends:
        declared.warmup = one["warmup share"] * ends[0]
        names["warmup"] = names["warmup share"]
    declared.peak = one.get("peak")
    if scales and "peak" not in told:
        declared.peak, names["peak"] = PEAK, "the maximum, that of the optimizer"
    if declared.peak is not None and declared.least is not None and not declared.least < declared.peak:
        raise NotApplicable(f"its minimum {declared.least:g} is not below its maximum {declared.peak:g}")
    return declared
