"""The subject as the spec looks at it: one model at telling sizes, and what comes of comparing it with a family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..expect import Bound, NotApplicable
from ..probes.rounding import in_float64
from ..subject import ABSENCE, Subject, amplify, cast, one_thread
from .agreement import BOUNDS
from .reference import Variant
from .weights.inventory import Inventory, take
from .weights.roles import NoPlan, Plan, Shape

# Sizes that differ from one another and from what follows from them; the first that the subject takes.
TELLING: tuple[dict[str, int], ...] = (
    {"n_layer": 3, "n_head": 6, "n_embd": 60},
    {"n_layer": 3, "n_head": 4, "n_embd": 40},
    {"n_layer": 3},
    {"n_head": 6, "n_embd": 60},
    {},
)
LARGEST = 20_000_000  # weights: beyond this, float64 and many forward passes take minutes


@dataclass
class Specimen:
    """The subject as the spec looks at it: one model with amplified weights, in float64 where it runs so."""

    subject: Subject
    model: nn.Module
    shape: Shape
    inventory: Inventory
    tokens: Tensor
    dtype: torch.dtype

    @property
    def bound(self) -> Bound:
        return BOUNDS[self.dtype]

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """What the subject gives with its weights as they are now, in float64."""
        with torch.no_grad(), self.running():
            return self.subject.logits(self.model, self.tokens if tokens is None else tokens).double()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_thread())
            if self.dtype == torch.float64:
                stack.enter_context(in_float64())
            yield


@dataclass
class Settled:
    """How the subject compares with one family. `error` is that of the best plan and variant; None without a plan."""

    family: str
    specimen: Specimen
    theirs: Tensor
    plan: Plan | None = None
    variant: Variant | None = None
    error: float | None = None
    why_not: str = ""  # why there is no plan
    tried: int = 0
    seconds: float = 0.0
    candidates: list[tuple[Plan, Variant]] = field(default_factory=list)
    near: list[tuple[Plan, Variant, dict[str, float]]] | None = None  # see nearest

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error <= self.specimen.bound.size


def specimen(subject: Subject) -> Specimen:
    """Built once a subject. Raises NotApplicable where it cannot be built, run or kept in float64."""
    return subject.once(_take)


def _take(subject: Subject) -> Specimen:
    refused: list[str] = []
    for dtype in (torch.float64, torch.float32):
        for sizes in TELLING:
            try:
                return _specimen(subject, sizes, dtype)
            except NotApplicable as reason:
                refused.append(reason.reason)
            except NoPlan:
                raise
            except Exception as error:  # whatever a foreign model raises at sizes or types that it does not take
                refused.append(f"{type(error).__name__}: {error}")
            if not sizes:
                break
    raise NotApplicable("the model does not run at the sizes and types of the spec", tried=refused)


def _specimen(subject: Subject, sizes: dict[str, int], dtype: torch.dtype) -> Specimen:
    for name in sizes:
        if not subject.can_vary(name):
            raise NotApplicable(f"{name} is fixed")
    asked = {**vars(subject.sizes), **sizes, "dropout": 0.0 if subject.can_vary("dropout") else subject.sizes.dropout}
    running = in_float64() if dtype == torch.float64 else contextlib.nullcontext()
    with one_thread(), running:
        model = subject.build(seed=subject.seed, **{k: v for k, v in asked.items() if subject.can_vary(k)})
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            raise NotApplicable(f"more than {LARGEST:,} weights: declare the architecture on a smaller model")
        cast(model, dtype)
        tokens = subject.tokens(3, asked["block_size"], seed=subject.seed)
        short = tokens[:2, : min(5, tokens.shape[1])].contiguous()
        inventory = take(model, lambda: subject.logits(model, short), asked["n_layer"])
        amplify(model, *ABSENCE, seed=subject.seed)
    shape = Shape(asked["vocab_size"], asked["block_size"], asked["n_head"], asked["n_embd"])
    return Specimen(subject, model, shape, inventory, tokens, dtype)
