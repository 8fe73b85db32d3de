"""Why a model could not be loaded, for the user: what was tried, where it broke, and how to fix it."""

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
from .process import SubjectExit, SubjectWaits
from .sandbox import Sandbox
from .stubs import LeftOut, MissingLibrary, Stub
from .which_model import KINDS, Found

OTHER_FRAMEWORKS = {"jax", "haiku", "flax", "tensorflow", "keras", "mlx", "tinygrad", "paddle", "mindspore"}
TOKENS = vocabulary.words("inputs idx tokens ids inputids tokenids x tokensids")


@dataclass
class Trial:
    """One attempt that failed: how the model was built, and the error."""

    target: Any
    recipe: Recipe | None
    error: Exception
    built: bool

    @property
    def rank(self) -> tuple[bool, bool]:
        """Lowest for the attempt that got farthest."""
        return (not self.built, isinstance(self.error, Unfillable))


def label_of(what: Any) -> str:
    target = what if inspect.isclass(what) or inspect.isroutine(what) else type(what)
    return getattr(target, "__name__", type(what).__name__)


def no_model(found: Found) -> str:
    functions = {k: v for k, v in found.scope.items() if inspect.isfunction(v) and not k.startswith("_")}
    there = ", ".join(functions) or "none"
    says = f"{found.shown} has no model: no nn.Module class, no model object, no build_model (functions: {there})"
    return f"{says}\n{_other_framework(found.sandbox)}{factory(_of_a_function(functions))}"


def _of_a_function(functions: dict[str, Any]) -> str:
    """For a model that is a function of tokens and weights: an object that is called with the tokens alone."""
    for name, function in sorted(functions.items(), key=lambda item: not any(k in item[0].lower() for k in KINDS)):
        parameters = list(inspect.signature(function).parameters)
        if len(parameters) > 1 and vocabulary.squash(parameters[0]) in TOKENS and name not in ("generate", "main"):
            weights = ", ".join(f"{p}=…" for p in parameters[1:4]) + ", …" * (len(parameters) > 4)
            return f"lambda {parameters[0]}: {name}({parameters[0]}, {weights})  # one row of ids to logits [T, V]"
    return "…"


def _other_framework(sandbox: Sandbox) -> str:
    missing = {remark.split()[0].partition(".")[0] for remark in sandbox.remarks if "could not be imported" in remark}
    others = sorted(missing & OTHER_FRAMEWORKS)
    return f"  it is written for {', '.join(others)}: only PyTorch and NumPy models can be checked\n" if others else ""


def several_models(label: str, names: list[str]) -> str:
    listed = "\n".join(f"    --model {name}" for name in names)
    return f"{label} has several models; choose one:\n{listed}"


def factory(call: str) -> str:
    """The lines to add where a model cannot be built without help."""
    return (
        "  to fix this, add a factory to that file (or to one beside it):\n"
        "    def build_model(vocab_size, block_size):\n"
        f"        return {call}"
    )


def explain(trials: list[Trial], sandbox: Sandbox, label: str) -> str:
    """Why nothing could be built and called: the attempt that got farthest, and how to fix it."""
    if not trials:
        return f"{label}: no way to build a model was found\n{factory('…')}"
    likeliest = next((t.target for t in trials if not inspect.isfunction(t.target)), None)
    trial = min((t for t in trials if inspect.isfunction(t.target) or t.target is likeliest), key=lambda t: t.rank)
    name, where, hint = label_of(trial.target), _defined(trial.target, sandbox), _other_framework(sandbox)
    if isinstance(trial.error, Unfillable):
        parameters = [p.name for p in signature_of(trial.target).parameters]
        gaps = ", ".join(f"{p}=…" for p in trial.error.missing)
        says = f"{where}{name} could not be built: no value found for {', '.join(trial.error.missing)}"
        return f"{says}\n  its parameters: {name}({', '.join(parameters)})\n{hint}{factory(f'{name}({gaps}, …)')}"
    if isinstance(trial.error, Uncallable):
        first = trial.error.attempts[0][1] if trial.error.attempts else trial.error
        fix = _remedy(first, sandbox) or _wrapper(first)
        tried = _attempts(trial.error, sandbox)
        return f"{where}{name} was built but returned no logits [B, T, V]\n{tried}\n{hint}{fix}"
    happened, failed = what_happened(trial.error, sandbox), "could not be built"
    if inspect.isfunction(trial.target):
        failed = "did not build a model"
    says = f"{where}{name}: {happened}" if trial.built else f"{where}{name} {failed}\n  {happened}"
    call = "MyModel(…)" if name == "build_model" else f"{name}(…)"
    return f"{says}\n{hint}{_remedy(trial.error, sandbox) or factory(call)}"


def _remedy(error: Exception, sandbox: Sandbox) -> str:
    """How to fix an error that every other way of building or calling would run into too; "" for any other error."""
    if isinstance(error, MissingLibrary):
        return "  to fix this, install that library, or use a model that does not need it"
    if isinstance(error, LeftOut):
        return factory("…  # with that value set first") + (
            "\n  a file that reads data or trains when it is imported is not run: only its definitions are loaded"
        )
    if isinstance(error, SubjectExit | SubjectWaits):
        return "  to fix this, remove that line"
    if any(word in str(error).lower() for word in ("cuda", "nvidia")):
        return (
            "  to fix this, use --gpu on a machine that has one, or make that line use the device of its input "
            "(device=tokens.device instead of .cuda())"
        )
    if f"{Stub.__module__}." in str(error):
        gone = ", ".join(remark.split()[0] for remark in sandbox.remarks if "could not be imported" in remark)
        return f"  to fix this, install {gone} (the model needs it), or use a model that does not need it"
    if "2D attn_mask is" in str(error):
        return (
            "  to fix this, pass batch_first=True where nn.MultiheadAttention or nn.TransformerEncoderLayer is made:\n"
            "  without it they read [T, B, C], and given [B, T, C] they attend across the rows of the batch"
        )
    mine = next(iter(reversed(list(own_frames(error, sandbox)))), None) is not None
    if isinstance(error, NotImplementedError) and mine:
        return "  to fix this, write that part: it is still to be written"
    if isinstance(error, NameError) and mine:
        return "  to fix this, correct that line: it fails for every input"
    return ""


def _attempts(error: Uncallable, sandbox: Sandbox) -> str:
    lines = [] if error.attempts else ["  it has no forward of its own"]
    for form, problem in error.attempts[:4]:
        lines.append(
            f"  {form.says}: {problem if isinstance(problem, Unreadable) else what_happened(problem, sandbox)}"
        )
    return "\n".join(dict.fromkeys(lines))


def _wrapper(error: Exception) -> str:
    if isinstance(error, Unreadable) and error.last_only:
        return (
            "  to fix this, return logits for every position, head(x) instead of head(x[:, -1]): training and most\n"
            "  checks need them all. Or add a factory whose model does:\n"
            "    def build_model(vocab_size, block_size):\n"
            "        return MyModel(…)  # forward(tokens) -> logits [B, T, vocab_size]"
        )
    return (
        "  to fix this, add a factory whose model takes tokens [B, T] and returns logits for every position:\n"
        "    def build_model(vocab_size, block_size):\n"
        "        return MyModel(…)  # forward(tokens) -> logits [B, T, vocab_size]"
    )


def _defined(target: Any, sandbox: Sandbox) -> str:
    """`model.py:29: `, where the class or factory is defined."""
    target = target if inspect.isclass(target) or inspect.isfunction(target) else type(target)
    code = getattr(target if inspect.isfunction(target) else vars(target).get("__init__"), "__code__", None)
    if code is None or not sandbox.owns(code.co_filename):
        return ""
    return f"{shown(code.co_filename)}:{code.co_firstlineno}: "
