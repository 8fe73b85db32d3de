"""How to call a foreign preference or distillation loss: each parameter by the words of its name. Nothing here judges.

Policy and reference (or student and teacher) are scripted: their logits are leaves, so that a gradient tells which
places a loss is made of.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..expect import NotApplicable
from ..meet.vocabulary import CHOSEN, REJECTED, words
from ..probes.scripted_logits import scripted
from ..subject import Companion, Subject

B, T, PROMPT = 3, 9, 3  # rows, tokens of a row, tokens of its prompt
LENGTHS = {"chosen": (9, 7, 8), "rejected": (6, 9, 5)}  # of each row without its padding
IGNORED = -100
MASKS = (torch.float32, torch.bool, torch.int64)

WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
OTHER = words("ref reference teacher base frozen old sft")
MODELS = words("model policy reference ref net network student teacher")
NUMBERS = {"beta": 0.1, "temperature": 2.0, "temp": 2.0, "tau": 2.0, "t": 2.0, "gamma": 0.5, "lam": 0.5, "lambda": 0.5}
MIXES = words("alpha lam lambda weight mix")  # between a distillation loss and a cross entropy
HIDES = words("pad padding prompt ignore drop exclude")  # true hides, in the name of a mask


@dataclass(frozen=True)
class Role:
    """What a parameter takes: `what` of whose model (`other`: the reference or teacher), for which answer."""

    what: str  # model, tokens, mask, labels, logps, logits, number
    other: bool = False
    side: str = ""  # chosen or rejected
    hides: bool = False


def role_of(name: str, has_model: bool) -> Role | None:
    named = frozenset(word.lower() for word in WORD.findall(name))
    other = bool(named & OTHER)
    side = "chosen" if named & CHOSEN else "rejected" if named & REJECTED else ""
    if "mask" in named or named & {"masks"}:
        return Role("mask", side=side, hides=bool(named & HIDES))
    if named & {"labels", "label", "targets", "target"}:
        return Role("labels", side=side)
    if "logits" in named or (not side and not has_model and named & {"student", "teacher"}):
        return Role("logits", other, side)
    if named & {"logps", "logp", "logprobs", "logprob", "lp", "log"} or (side and not has_model):
        return Role("logps", other, side)
    if side:
        return Role("tokens", side=side)
    if named & MODELS:
        return Role("model", other)
    if named & {"tokens", "ids", "idx", "inputs", "input", "x", "batch"}:
        return Role("tokens")
    return Role("number") if named & (NUMBERS.keys() | MIXES) else None


@dataclass
class Answers:
    """The data that a loss is called with, and the leaves: logits [2 B, T, V] of both models, chosen rows first.

    A loss of log-probabilities has leaves [2 B]. `counts` [2 B, T] is true for tokens of the answers.
    """

    subject: Subject
    seed: int
    tokens: Tensor = field(init=False)
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        V = self.subject.sizes.vocab_size
        self.tokens = self.subject.tokens(2 * B, T, seed=self.seed)
        self.tokens[B:, :PROMPT] = self.tokens[:B, :PROMPT]
        self.tokens[B:, PROMPT] = (self.tokens[:B, PROMPT] + 1) % V  # the answers differ from their first token on
        ends = torch.tensor([*LENGTHS["chosen"], *LENGTHS["rejected"]])[:, None]
        places = torch.arange(T)[None]
        self.counts = ((places >= PROMPT) & (places < ends)).to(self.tokens.device)

    def side(self, values: Tensor, side: str) -> Tensor:
        return values[B:] if side == "rejected" else values[:B]


@dataclass(frozen=True)
class MetAnswers:
    """A preference or distillation loss and how to call it."""

    subject: Subject
    companion: Companion
    roles: dict[str, Role]
    mask_dtype: torch.dtype = torch.float32
    aligned: bool = False  # whether masks and labels are those of the targets, one place shorter than the tokens

    @property
    def what(self) -> str:
        """What a leaf stands for: logits or log-probabilities."""
        return "logps" if self.takes("logps") else "logits"

    def takes(self, what: str) -> bool:
        return any(role.what == what for role in self.roles.values())

    @property
    def has_other(self) -> bool:
        return any(role.other for role in self.roles.values())

    def leaves(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.what == "logps":
            return -3 - torch.rand(2 * B, generator=generator)
        return torch.randn(2 * B, T, self.subject.width, generator=generator)

    def __call__(self, data: Answers, policy: Tensor, other: Tensor, **numbers: float) -> Tensor:
        """The loss of these leaves, a scalar; a mean over what it returns for each row."""
        function, models = self.companion.value, {}
        parameters = inspect.signature(function).parameters
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.subject.running())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for is_other, leaf in ((False, policy), (True, other)):
                if any(role.what == "model" and role.other == is_other for role in self.roles.values()):
                    models[is_other] = self.subject.build(seed=int(is_other))
                    script = rows_of(data, leaf)
                    stack.enter_context(scripted(self.subject, models[is_other], script))
            given: dict[str, Any] = {}
            for name, role in self.roles.items():
                if role.what == "number":
                    if name in numbers:
                        given[name] = numbers[name]
                    elif parameters[name].default is inspect.Parameter.empty:
                        given[name] = NUMBERS.get(name.lower(), 0.5)
                elif role.what == "model":
                    given[name] = models[role.other]
                else:
                    given[name] = self._value(role, data, other if role.other else policy)
            return loss_of(function(**given))

    def _value(self, role: Role, data: Answers, leaf: Tensor) -> Tensor:
        start = 1 if self.aligned else 0
        if role.what in ("logps", "logits"):
            return data.side(leaf, role.side)
        if role.what == "tokens":
            return data.side(data.tokens, role.side)
        counts = data.side(data.counts, role.side)[:, start:]
        if role.what == "mask":
            return (counts != role.hides).to(self.mask_dtype)
        return data.side(data.tokens, role.side)[:, start:].masked_fill(~counts, IGNORED)


def rows_of(data: Answers, leaf: Tensor) -> Any:
    """A script that knows each row by its tokens, chosen and rejected ones side by side or one after the other."""

    def script(tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        same = (tokens[:, None] == data.tokens[None, :, :n]).all(-1)
        if n <= PROMPT or not bool(same.any(1).all()):
            raise NotApplicable("it calls the model on other texts than those that it is given")
        return leaf[same.int().argmax(1), :n]

    return script


def loss_of(result: Any) -> Tensor:
    """The loss in what was returned: the first tensor, or what is called loss."""
    if isinstance(result, dict):
        result = result.get("loss", next(iter(result.values()), None))
    if isinstance(result, tuple | list):
        result = next((item for item in result if isinstance(item, Tensor)), None)
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise NotApplicable("it returns no loss")
    return result.double().mean()


def met_answers(subject: Subject, companion: Companion) -> MetAnswers:
    """How it is called. Raises NotApplicable if no way was found."""
    return subject.once(_met, companion)


def _met(subject: Subject, companion: Companion) -> MetAnswers:
    parameters = inspect.signature(companion.value).parameters
    has_model = any(frozenset(name.lower().split("_")) <= MODELS | {"fn"} for name in parameters)
    has_model = has_model and companion.kind == "preference loss"
    roles: dict[str, Role] = {}
    for name, parameter in parameters.items():
        role = role_of(name, has_model)
        required = parameter.default is parameter.empty
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if role is None and required:
            raise NotApplicable(f"it has a required parameter {name!r} that no check knows how to fill")
        if role is not None and (required or role.what != "logits" or role.other):
            roles[name] = role
    if subject.sizes.block_size < T and has_model:
        raise NotApplicable(f"the model reads fewer than {T} tokens")
    data, errors = Answers(subject, subject.seed), []
    for dtype, aligned in itertools.product(MASKS, (False, True)):
        met = MetAnswers(subject, companion, roles, dtype, aligned)
        try:
            met(data, met.leaves(1), met.leaves(2))
            return met
        except NotApplicable:
            raise
        except Exception as error:
            errors.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
    raise NotApplicable(f"no way to call it was found ({errors[0]})")
