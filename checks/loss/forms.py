"""How a foreign loss can be called: as a function whose parameters are recognised by name, or through its model.

Also which function of a user's file is its loss, where none is called `loss`. Nothing here judges.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..meet.logits import standing_for
from ..meet.roles import role_among
from ..meet.vocabulary import squash
from ..probes.extra_arguments import targets_of
from ..subject import Subject
from ..watch.calls import recorded
from .reading import Loss

VOCABULARY = 17
PLACES = 7  # targets in a row of a reading
SPARE = 2  # more, in case the loss shifts them itself

ROLES = ("logits", "targets", "model", "batch", "vocabulary", "device")
ALSO_TARGETS = ("tokens", "tokenids", "ids")  # loss(logits, tokens)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, T, V]": lambda x: x,
    "[B·T, V]": lambda x: x.flatten(0, 1),
    "[B, V, T]": lambda x: x.transpose(1, 2),
}
IGNORED = (-100, -1)
KINDS = (torch.bool, torch.float32, torch.int64)  # of a mask argument
LOSS_NAME = re.compile(r"(^|_)(loss|nll|cross_?entropy)(_|$)", re.IGNORECASE)
NO_LOSS_NAME = re.compile(
    r"plot|log|print|eval|estim|train|valid|test|record|save|aux|balanc|distil|contrast|triplet|reward"
)


@dataclass(frozen=True)
class Form:
    """One way to call a loss. `raw` takes logits [B, T, V], and labels and mask as the loss aligns them."""

    raw: Loss
    says: str
    V: int
    longest: int = PLACES + SPARE  # the longest row of labels
    takes_mask: bool = False
    inside_model: bool = False
    changes_logits: bool = False  # the model does so after the module whose output is replaced
    gives: str = ""  # what that module gives: "logits", "log-probabilities" or "probabilities"
    documented: bool = False  # the subject declares this form: if the call fails, that is its own mistake


# -- a function


def forms(function: Any, subject: Subject) -> Iterator[Form]:
    """Every way in which this loss may be called, the likeliest first."""
    roles = parameter_roles(function)
    mask = next((name for name, role in roles.items() if role == "mask"), None)
    drops = mask is not None and any(word in mask.lower() for word in ("pad", "ignore", "drop", "exclude"))
    declared = subject.declared("called") is not None
    layouts = ["[B, T, V]"] if "model" in roles.values() or declared else list(LAYOUTS)
    sizes = dict.fromkeys((VOCABULARY, subject.sizes.vocab_size))
    for V, layout, kind in itertools.product(sizes, layouts, KINDS if mask and not declared else KINDS[:1]):
        says = ", ".join(f"{name} {layout}" if role == "logits" else name for name, role in roles.items())
        raw = filled(function, roles, layout, V, kind, drops)
        yield Form(raw, f"loss({says})", V, takes_mask=mask is not None, documented=declared)


def filled(function: Any, roles: dict[str, str], layout: str, V: int, kind: torch.dtype, drops: bool) -> Loss:
    arrange, flat, needs_mask = LAYOUTS[layout], layout == "[B·T, V]", requires(function, "mask", roles)

    def raw(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Any:
        if mask is None and needs_mask:
            mask = torch.ones_like(labels, dtype=torch.bool)
        if mask is not None:
            mask = (~mask if drops else mask).to(kind).contiguous()
        values = {
            "logits": torch.zeros_like(labels) if "model" in roles.values() else arrange(logits),
            "targets": labels.flatten() if flat else labels,
            "mask": mask.flatten() if mask is not None and flat else mask,
            "ignore": IGNORED[0],
            "vocabulary": V,
            "model": Scripted(logits),
            "batch": (torch.zeros_like(labels), labels),
            "device": logits.device,
        }
        given = {name: values[role] for name, role in roles.items()}
        if mask is None:
            given = {name: value for name, value in given.items() if roles[name] != "mask"}
        positional = [given.pop(name) for name in list(given) if name.isdigit()]
        return function(*positional, **given)

    return raw


def parameter_roles(function: Any) -> dict[str, str]:
    """The role of each parameter, in order. Optional ones keep their defaults, except logits, targets and masks.

    Raises NotApplicable for a required one whose role is unknown.
    """
    try:
        called = function.forward if isinstance(function, nn.Module) else function
        parameters = list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):
        return {"0": "logits", "1": "targets"}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        return {"0": "logits", "1": "targets"}
    roles: dict[str, str] = {}
    for parameter in named:
        required, taken = parameter.default is parameter.empty, list(roles.values())
        role = role_of(parameter.name.lower(), taken)
        if required and (not role or role in taken):
            role = next((other for other in ("logits", "targets", "mask") if other not in taken), "")
            if not role:
                raise NotApplicable(f"the loss requires a parameter {parameter.name!r} that no check knows how to fill")
        if role and role not in taken and (required or role in ("logits", "targets", "mask")):
            roles[parameter.name] = role
    return roles


def requires(function: Any, role: str, roles: dict[str, str]) -> bool:
    called = function.forward if isinstance(function, nn.Module) else function
    name = next((name for name, found in roles.items() if found == role), None)
    return name is not None and inspect.signature(called).parameters[name].default is inspect.Parameter.empty


def role_of(name: str, taken: list[str]) -> str:
    if "mask" in name or name in ("loss_weights", "token_weights", "keep", "m"):
        return "mask"
    if "ignore" in name or ("pad" in name and any(word in name for word in ("id", "index", "token"))):
        return "ignore"
    if name == "tokens" and "model" in taken and "logits" not in taken:
        return "logits"  # loss(model, tokens, targets): what the model reads
    return role_among(name, ROLES) or ("targets" if squash(name) in ALSO_TARGETS else "")


class Scripted(nn.Module):
    """A model whose logits are given, for losses that call a model themselves."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.logits


# -- which function of a file is its loss, where none is called `loss`


def loss_in(scope: Mapping[str, Any], module: str) -> str | None:
    """The name of the only function that looks like a loss of logits and targets; of several, the one with a mask."""
    found = [name for name, value in scope.items() if _is_loss(name, value, module)]
    masked = [name for name in found if "mask" in _roles(scope[name])]
    best = masked or found
    return best[0] if len(best) == 1 else None


def _is_loss(name: str, value: Any, module: str) -> bool:
    if not inspect.isfunction(value) or value.__module__ != module:
        return False
    named = LOSS_NAME.search(name) is not None and NO_LOSS_NAME.search(name.lower()) is None
    return named and _roles(value)[:2] == ["logits", "targets"]


def _roles(function: Any) -> list[str]:
    roles: list[str] = []
    for parameter in inspect.signature(function).parameters:
        roles.append(role_of(parameter.lower(), roles))
    return roles


# -- the loss that a model returns


def model_form(subject: Subject) -> Form:
    """`model(tokens, targets)` with the output of its head replaced by the given logits."""
    model = subject.build()
    parameter = targets_of(subject)
    if parameter is None:
        raise NotApplicable("no loss was found, and the model takes no targets", unless="--with loss=FILE.py:NAME")
    name = parameter.name
    try:
        inspect.signature(model.forward).bind(None, **{name: None})
    except TypeError as error:
        raise NotApplicable(f"forward cannot be called with tokens and {name} alone: {error}") from None
    head, plain, gives = find_head(subject, model, name)
    own = head.forward

    def raw(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        # Restored afterwards: this may be the only instance.
        with patch.object(head, "forward", lambda *args, **kwargs: _replaced(own(*args, **kwargs), logits)):
            return returned_loss(model, with_targets(subject, model, torch.zeros_like(labels), {name: labels}))

    longest = min(PLACES + SPARE, subject.sizes.block_size)
    V, says = subject.sizes.vocab_size, f"model(tokens, {name}=…)"
    return Form(raw, says, V, longest, inside_model=True, changes_logits=not plain, gives=gives)


def _replaced(output: Any, logits: Tensor) -> Any:
    """The given logits for those of every position; a head that is used again, for fewer of them, keeps its own."""
    shorter = isinstance(output, Tensor) and output.dim() == 3 and output.shape[1] < logits.shape[1]
    return output if shorter else logits


def find_head(subject: Subject, model: nn.Module, name: str) -> tuple[nn.Module, bool, str]:
    """The last module whose output is [B, T, V], whether that output is returned unchanged, and what it stands for.

    What the model does afterwards (a softcap, a log-softmax, something added) stays in place.
    """
    tokens = subject.tokens(2, min(PLACES, subject.sizes.block_size))
    with torch.no_grad(), recorded(model) as calls:
        result = called_with_targets(subject, model, tokens, name)
    wanted = (*tokens.shape, subject.sizes.vocab_size)
    logits = [t.flatten() for t in tensors_of(result) if t.dim() > 1 and t.shape[-1] == wanted[-1]]
    for call in reversed(calls):
        given = next((output for output in call.outputs if output.shape == wanted), None)
        if call.module != type(model).__name__ and given is not None:
            plain = not logits or any(torch.equal(t, given.flatten()) for t in logits)
            return model.get_submodule(call.module), plain, standing_for(given)
    raise NotApplicable("the model computes its loss itself, and no module outputs logits that could be replaced")


def called_with_targets(subject: Subject, model: nn.Module, tokens: Tensor, name: str) -> Any:
    """Raises NotApplicable for a model that takes targets only at its full block size."""
    try:
        return with_targets(subject, model, tokens, {name: tokens})
    except Exception:
        whole = subject.tokens(2, subject.sizes.block_size)
        if whole.shape == tokens.shape:
            raise
        try:
            with_targets(subject, model, whole, {name: whole})
        except Exception:
            whole = tokens
        if whole is tokens:
            raise
    raise NotApplicable("the model takes targets only for rows of its full block size")


def with_targets(subject: Subject, model: nn.Module, tokens: Tensor, targets: Mapping[str, Tensor]) -> Any:
    """What forward returns with targets, called as for logits otherwise."""
    return model(tokens, **{**subject.beside(model, tokens), **targets})


def returned_loss(model: nn.Module, result: Any) -> Tensor:
    """The scalar in what the model returned, else what it left in `last_loss`."""
    scalars = [t for t in tensors_of(result) if t.dim() == 0 and t.is_floating_point()]
    left = getattr(model, "last_loss", None)
    if not scalars and isinstance(left, Tensor):
        scalars = [left]
    if not scalars:
        raise NotApplicable("the model takes targets but returns no loss")
    return scalars[0]


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "loss"):
        return tensors_of([value.loss, getattr(value, "logits", None)])
    items = list(value.values()) if isinstance(value, dict) else value
    return [t for item in items for t in tensors_of(item)] if isinstance(items, tuple | list) else []
