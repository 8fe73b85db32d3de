"""How to call a foreign train_step: its parameters by name, the form of its batch by trying. Nothing here judges.

A `MetStep` makes one optimizer step on examples (lists of token ids of equal length) in the form that it expects.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..expect import NotApplicable
from ..meet.roles import role_among
from ..subject import Subject
from .explained import parallel
from .runs import Example, Losses, Step, examples, flat, model_of

ROLES = (
    "model", "optimizer", "batch", "tokens", "targets", "mask", "loss", "scheduler", "scaler", "device", "clip",
    "count", "vocabulary",
)  # fmt: skip
ALWAYS = ("model", "optimizer", "batch", "tokens", "targets")  # passed even if they have a default
FORMS = ("(tokens, targets)", "{input_ids, labels}, both alike", "{tokens, targets, …}", "tokens alone")
IGNORED = -100  # the target id of padding, as in PyTorch's cross entropy
SURE = 1 - 1e-6  # cosine of two updates in the same direction
RATE = 0.05
ROWS = (5, 8)  # in a batch; five give uneven micro-batches, which some steps refuse
CALLS = 16  # within which a step that accumulates over calls has updated the weights


class Criterion(nn.Module):
    """A loss for a step that takes one as an argument: cross entropy of logits and targets in any layout."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.dim() == 3 and logits.shape[:2] != targets.shape and logits.shape[::2] == targets.shape:
            logits = logits.transpose(1, 2)  # [B, V, T]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class Fields(dict[str, Any]):
    """A batch with named fields, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Fields:
        return Fields({name: value.to(device) for name, value in self.items()})


@dataclass(frozen=True)
class MetStep:
    """A subject's train_step and how to call it."""

    function: Callable[..., Any]
    roles: dict[str, str]  # parameter → role
    form: str
    right: bool  # whether its update on a first batch has the direction of the next-token gradient
    factor: float  # norm of that update divided by the gradient's
    dtype: torch.dtype
    first: Step  # the step on that batch
    calls: int = 1  # until the weights changed: more than one if gradients are accumulated over calls

    @property
    def says(self) -> str:
        return f"train_step({', '.join(self.roles)}), batch as {self.form}"

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Example], **given: Any) -> Step:
        """One optimizer step. `given` are values by role, instead of the neutral ones."""
        return one_step(self.function, self.roles_with(given), self.form, model, optimizer, batch, given)[0]

    def takes(self, role: str) -> str | None:
        """The parameter for a role, including those with a default."""
        return next((name for name, found in every_role(self.function).items() if found == role), None)

    def roles_with(self, given: dict[str, Any]) -> dict[str, str]:
        return {**self.roles, **{name: role for role in given if (name := self.takes(role))}}


def met_step(subject: Subject) -> MetStep:
    """The subject's train_step. Raises NotApplicable if it has none, or none that can be called."""
    return subject.once(_recognised_step)


def _recognised_step(subject: Subject) -> MetStep:
    function = subject.part("train_step")
    if function is None:
        raise NotApplicable("no train_step was found in your file", unless="--with train_step=FILE.py:NAME")
    roles = parameter_roles(function)
    if isinstance(roles, str):
        raise NotApplicable(roles)
    errors: list[str] = []
    found = list(trials(subject, function, roles, errors))
    if not found:
        raise NotApplicable("no way to call train_step was found", tried=list(dict.fromkeys(errors)))
    return next((met for met in found if met.right), found[0])


def trials(
    subject: Subject, function: Callable[..., Any], roles: dict[str, str], errors: list[str]
) -> Iterator[MetStep]:
    """One step for each form of batch that works, up to the first that follows the gradient."""
    forms = FORMS if "batch" in roles.values() else FORMS[:2] if "targets" in roles.values() else FORMS[3:]
    ran = False
    for rows, dtype in itertools.product(ROWS, (torch.float64, torch.float32)):
        if ran:
            return  # float32 only if float64 does not run
        batch = equal_examples(subject, rows, seed=1)
        for form in forms:
            model = model_of(subject).to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            gradient = Losses(subject, model).mean(batch)[0]
            try:
                with warnings.catch_warnings():  # from trying forms that the function does not expect
                    warnings.simplefilter("ignore")
                    step, calls = one_step(function, roles, form, model, optimizer, batch)
            except Exception as error:
                errors.append(f"{form}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
                continue
            ran = True
            towards = -step.update / optimizer.param_groups[0]["lr"]
            right = parallel(towards, gradient) > (SURE if dtype == torch.float64 else 1 - 1e-4)
            factor = float(towards.norm() / gradient.norm())
            yield MetStep(function, roles, form, right, factor, dtype, step, calls)
            if right:
                return


def one_step(
    function: Callable[..., Any],
    roles: dict[str, str],
    form: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    given: dict[str, Any] | None = None,
) -> tuple[Step, int]:
    """Calls until the weights change or no gradient waits for a later call. The step, and the number of calls."""
    before, n = flat(model), 0
    while True:
        result = call(function, roles, form, model, optimizer, batch, {"count": n, **(given or {})})
        n += 1
        waits = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        if n == CALLS or not waits or not torch.equal(before, flat(model)):
            return Step(list(batch), reported(result), before, flat(model)), n


def equal_examples(subject: Subject, count: int, *, seed: int = 0) -> list[Example]:
    """Examples of equal length, short enough for a step that reads them whole and shifts inside."""
    return examples(subject, count, ragged=False, seed=seed, longest=subject.sizes.block_size - 1)


def parameter_roles(function: Callable[..., Any]) -> dict[str, str] | str:
    """The role of each parameter; a sentence if a required parameter is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return "the signature of train_step cannot be read"
    roles: dict[str, str] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        role, required = role_among(parameter.name, ROLES), parameter.default is parameter.empty
        if not role and required:
            return f"train_step has a required parameter {parameter.name!r} that is not recognized"
        if role and (required or role in ALWAYS):
            roles[parameter.name] = role
    missing = {"model", "optimizer"} - set(roles.values())
    return f"train_step has no parameter for {' or '.join(sorted(missing))}" if missing else roles


def every_role(function: Callable[..., Any]) -> dict[str, str]:
    """The role of each parameter with a known name, including those with a default."""
    named = inspect.signature(function).parameters
    return {name: role for name in named if (role := role_among(name, ROLES))}


def call(
    function: Callable[..., Any],
    roles: dict[str, str],
    form: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    given: dict[str, Any],
) -> Any:
    device = next(model.parameters()).device
    longest = max(map(len, batch))
    whole = torch.tensor([[*example, *[0] * (longest - len(example))] for example in batch], device=device)
    labels = torch.tensor([[*example, *[IGNORED] * (longest - len(example))] for example in batch], device=device)
    tokens, targets = whole[:, :-1].contiguous(), labels[:, 1:].contiguous()
    if form == FORMS[1]:
        tokens, targets = whole, labels
    values = {
        "model": model,
        "optimizer": optimizer,
        "batch": in_form(form, whole, tokens, targets),
        "tokens": whole if form == FORMS[3] else tokens,
        "targets": targets,
        "mask": (targets != IGNORED).long(),
        "loss": Criterion(),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        "scaler": torch.amp.GradScaler(enabled=False),
        "device": whole.device,
        "clip": 1e9,
        "count": 0,
        "vocabulary": getattr(model, "vocab_size", 0),
    }
    values |= given
    return function(**{name: values[role] for name, role in roles.items()})


def in_form(form: str, whole: Tensor, tokens: Tensor, targets: Tensor) -> Any:
    if form == FORMS[0]:
        return tokens, targets
    if form == FORMS[3]:
        return whole
    if form == FORMS[1]:  # as in the transformers library, which takes exactly these names
        return Fields(input_ids=tokens, attention_mask=(targets != IGNORED).long(), labels=targets)
    names = dict.fromkeys(("input_ids", "tokens", "inputs", "x"), tokens)
    names |= dict.fromkeys(("labels", "targets", "target", "y"), targets)
    return Fields(names | dict.fromkeys(("attention_mask", "mask", "loss_mask"), (targets != IGNORED).long()))


def reported(result: Any) -> float | None:
    """The loss in what a step returned; None if there is none."""
    if isinstance(result, dict):
        result = result.get("loss", next(iter(result.values()), None))
    if isinstance(result, tuple | list):
        result = result[0] if result else None
    if isinstance(result, Tensor) and result.numel() == 1:
        return float(result.detach())
    return float(result) if isinstance(result, float | int) and not isinstance(result, bool) else None
