"""What is said of a subject that could not be met: what was tried, where it broke, and what would settle it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from ..expect import shown
from . import vocabulary
from .arguments import signature_of
from .build import Recipe, Unfillable
from .errors import own_frames, what_happened
from .forward import Uncallable
from .logits import Unreadable
from .sandbox import Sandbox, SubjectWaits
from .stubs import LeftOut, MissingLibrary
from .which_model import KINDS, Named

OTHER_FRAMEWORKS = {"jax", "haiku", "flax", "tensorflow", "keras", "mlx", "tinygrad", "paddle", "mindspore"}
TOKENS = vocabulary.words("inputs idx tokens ids inputids tokenids x tokensids")


@dataclass
class Trial:
    """One attempt that failed: how it was built, and why not."""

    target: Any
    recipe: Recipe | None
    error: Exception
    built: bool

    @property
    def rank(self) -> tuple[bool, bool]:
        return (not self.built, isinstance(self.error, Unfillable))


def label_of(what: Any) -> str:
    target = what if inspect.isclass(what) or inspect.isroutine(what) else type(what)
    return getattr(target, "__name__", type(what).__name__)


def nothing(found: Named) -> str:
    """Of a file without a model."""
    functions = {k: v for k, v in found.scope.items() if inspect.isfunction(v) and not k.startswith("_")}
    there = ", ".join(functions) or "none"
    says = f"{found.shown} has no model: no nn.Module class, no instance and no build_model (functions: {there})"
    return f"{says}\n{_other_framework(found.sandbox)}{factory(_of_a_function(functions))}"


def _of_a_function(functions: dict[str, Any]) -> str:
    """A model that is a function of tokens and weights, as an object that is called with the tokens alone."""
    for name, function in sorted(functions.items(), key=lambda item: not any(k in item[0].lower() for k in KINDS)):
        parameters = list(inspect.signature(function).parameters)
        if len(parameters) > 1 and vocabulary.squash(parameters[0]) in TOKENS and name not in ("generate", "main"):
            weights = ", ".join(f"{p}=…" for p in parameters[1:4]) + ", …" * (len(parameters) > 4)
            return f"lambda {parameters[0]}: {name}({parameters[0]}, {weights})  # one row of ids to logits [T, V]"
    return "…"


def _other_framework(sandbox: Sandbox) -> str:
    missing = {remark.split()[0].partition(".")[0] for remark in sandbox.remarks if "could not be imported" in remark}
    others = sorted(missing & OTHER_FRAMEWORKS)
    return f"  it is written for {', '.join(others)}: PyTorch and NumPy models can be checked\n" if others else ""


def several(label: str, candidates: list[str]) -> str:
    listed = "\n".join(f"    --model {name}" for name in candidates)
    return f"{label} has several models; say which:\n{listed}"


def factory(call: str) -> str:
    """The three lines that settle how a model is built."""
    return (
        "  what settles it: a factory in that file (or one beside it)\n"
        "    def build_model(vocab_size, block_size):\n"
        f"        return {call}"
    )


def explain(trials: list[Trial], sandbox: Sandbox, label: str) -> str:
    """Why nothing could be built and called: the attempt that got farthest, and what would settle it."""
    if not trials:
        return f"{label}: nothing to try\n{factory('…')}"
    likeliest = next((t.target for t in trials if not inspect.isfunction(t.target)), None)
    trial = min((t for t in trials if inspect.isfunction(t.target) or t.target is likeliest), key=lambda t: t.rank)
    name, where, hint = label_of(trial.target), _defined(trial.target, sandbox), _other_framework(sandbox)
    if isinstance(trial.error, Unfillable):
        wanted = [p.name for p in signature_of(trial.target).parameters]
        gaps = ", ".join(f"{p}=…" for p in trial.error.missing)
        says = f"{where}{name} cannot be built from sizes: nothing to give for {', '.join(trial.error.missing)}"
        return f"{says}\n  seen: {name}({', '.join(wanted)})\n{hint}{factory(f'{name}({gaps}, …)')}"
    if isinstance(trial.error, Uncallable):
        first = trial.error.attempts[0][1] if trial.error.attempts else trial.error
        settles = _remedy(first, sandbox) or _wrapper(first)
        return f"{where}{name} gave no logits [B, T, V]\n{_attempts(trial.error, sandbox)}\n{hint}{settles}"
    could = "" if trial.built else " could not be built from sizes\n "
    settles = _remedy(trial.error, sandbox) or factory(f"{name}(…)")
    return f"{where}{name}{could or ':'} {what_happened(trial.error, sandbox)}\n{hint}{settles}"


def _remedy(error: Exception, sandbox: Sandbox) -> str:
    """What settles an error that no other way of building or calling would avoid; "" for any other."""
    if isinstance(error, MissingLibrary):
        return "  what settles it: that library, or a model that does without"
    if isinstance(error, LeftOut):
        return factory("…  # with that value set first") + (
            "\n  a file that reads data or trains when it is imported is not run: only its definitions are taken"
        )
    if isinstance(error, SubjectWaits):
        return "  what settles it: that line taken out"
    if any(word in str(error).lower() for word in ("cuda", "nvidia")):
        return (
            "  what settles it: --gpu where there is one, or that line on the device of its input "
            "(device=tokens.device in place of .cuda())"
        )
    if "conventions.stubs" in str(error):
        gone = ", ".join(remark.split()[0] for remark in sandbox.remarks if "could not be imported" in remark)
        return f"  what settles it: {gone} installed (a stand-in of it was computed with), or a model that does without"
    if "2D attn_mask is" in str(error):
        return (
            "  what settles it: batch_first=True, where nn.MultiheadAttention or nn.TransformerEncoderLayer is made: "
            "without it\n  they read [T, B, C], and [B, T, C] attends from row to row of the batch"
        )
    mine = next(iter(reversed(list(own_frames(error, sandbox)))), None) is not None
    if isinstance(error, NotImplementedError) and mine:
        return "  what settles it: that part is still to be written"
    if isinstance(error, NameError) and mine:
        return "  what settles it: that line fails whatever it is given"
    return ""


def _attempts(error: Uncallable, sandbox: Sandbox) -> str:
    lines = [] if error.attempts else ["  it has no forward of its own"]
    for way, problem in error.attempts[:4]:
        lines.append(f"  {way.says}: {problem if isinstance(problem, Unreadable) else what_happened(problem, sandbox)}")
    return "\n".join(dict.fromkeys(lines))


def _wrapper(error: Exception) -> str:
    if isinstance(error, Unreadable) and error.last_only:
        return (
            "  what settles it: logits for every position, head(x) in place of head(x[:, -1]): the others are what\n"
            "  training needs and most checks compare; or a factory whose model gives them\n"
            "    def build_model(vocab_size, block_size):\n"
            "        return MyModel(…)  # forward(tokens) -> logits [B, T, vocab_size]"
        )
    return (
        "  what settles it: a factory whose model takes tokens [B, T] and gives logits for every position\n"
        "    def build_model(vocab_size, block_size):\n"
        "        return MyModel(…)  # forward(tokens) -> logits [B, T, vocab_size]"
    )


def _defined(target: Any, sandbox: Sandbox) -> str:
    """`model.py:29: `, where the class or factory stands."""
    target = target if inspect.isclass(target) or inspect.isfunction(target) else type(target)
    code = getattr(target if inspect.isfunction(target) else vars(target).get("__init__"), "__code__", None)
    if code is None or not sandbox.owns(code.co_filename):
        return ""
    return f"{shown(code.co_filename)}:{code.co_firstlineno}: "
