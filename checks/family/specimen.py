"""The model that is compared with the reference, and the result of comparing it with one family.

`Specimen` is one model of the subject: at sizes that tell its axes apart, amplified, in float64 where it runs so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..expect import Bound, NotApplicable
from ..probes.rounding import in_float64
from ..subject import ABSENCE, Subject, amplify, cast, one_thread
from .reference import Variant
from .weights.inventory import Inventory, take
from .weights.roles import NoPlan, Plan, Shape

BOUNDS = {
    torch.float64: Bound(1e-9, "of the largest logit; correct models differ by 1e-15 of it in float64"),
    torch.float32: Bound(1e-5, "of the largest logit; correct models differ by up to 7e-7 of it in float32"),
}
# Sizes that differ from one another and from sizes derived from them; the first that the subject takes is used.
SIZES: tuple[dict[str, int], ...] = (
    {"n_layer": 3, "n_head": 6, "n_embd": 60},
    {"n_layer": 3, "n_head": 4, "n_embd": 40},
    {"n_layer": 3},
    {"n_head": 6, "n_embd": 60},
    {},
)
LARGEST = 20_000_000  # parameters; with more, many forward passes in float64 take minutes


@dataclass
class Specimen:
    """One model of the subject with amplified weights, in float64 where it runs in float64, and the tokens it reads."""

    subject: Subject
    model: nn.Module
    shape: Shape
    inventory: Inventory
    tokens: Tensor
    dtype: torch.dtype

    @property
    def bound(self) -> Bound:
        return BOUNDS[self.dtype]

    def recover(self) -> None:
        """Gives one instance, whose weights and type other checks have changed, those of the specimen again."""
        if not self.subject.builds_afresh:
            with self.running():
                cast(self.subject.build(seed=self.subject.seed), self.dtype)
                amplify(self.model, *ABSENCE, seed=self.subject.seed)

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """The model's logits with its weights as they are now, converted to float64."""
        with torch.no_grad(), self.running():
            return self.subject.logits(self.model, self.tokens if tokens is None else tokens).double()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Surrounds every forward pass: one thread, and no narrower type where the model runs in float64."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_thread())
            if self.dtype == torch.float64:
                stack.enter_context(in_float64())
            yield


@dataclass
class Fit:
    """How well the subject fits one family: the best plan and variant found, and how far its logits are from theirs."""

    family: str
    specimen: Specimen
    theirs: Tensor  # the subject's logits of `specimen.tokens`
    plan: Plan | None = None
    variant: Variant | None = None
    error: float | None = None  # largest difference of the logits, of the largest logit; None without a plan
    why_not: str = ""  # why there is no plan
    tried: int = 0  # plans and variants that were compared
    seconds: float = 0.0
    candidates: list[tuple[Plan, Variant]] = field(default_factory=list)
    near: list[tuple[Plan, Variant, dict[str, float]]] | None = None  # kept by closeness.nearest

    @property
    def agrees(self) -> bool:
        return self.error is not None and self.error <= self.specimen.bound.size


def specimen_of(subject: Subject) -> Specimen:
    """Built once per subject. Raises NotApplicable where the model cannot be built or run at any of the sizes."""
    specimen = subject.once(_specimen)
    specimen.recover()
    return specimen


def _specimen(subject: Subject) -> Specimen:
    refused: list[str] = []
    for dtype in (torch.float64, torch.float32):
        for sizes in SIZES:
            try:
                return _build(subject, sizes, dtype)
            except NotApplicable as reason:
                refused.append(reason.reason)
            except NoPlan:
                raise
            except Exception as error:  # whatever a model raises at sizes or types that it does not take
                refused.append(f"{type(error).__name__}: {error}")
            if not sizes:
                break
    raise NotApplicable("the model does not run at any of the sizes and types used for the comparison", tried=refused)


def _build(subject: Subject, sizes: dict[str, int], dtype: torch.dtype) -> Specimen:
    for name in sizes:
        if not subject.can_vary(name):
            raise NotApplicable(f"{name} is fixed")
    asked = {**vars(subject.sizes), **sizes, "dropout": 0.0 if subject.can_vary("dropout") else subject.sizes.dropout}
    running = in_float64() if dtype == torch.float64 else contextlib.nullcontext()
    with one_thread(), running:
        model = subject.build(seed=subject.seed, **{k: v for k, v in asked.items() if subject.can_vary(k)})
        if sum(p.numel() for p in model.parameters()) > LARGEST:
            raise NotApplicable(f"more than {LARGEST:,} parameters: compare a smaller model of the same code")
        cast(model, dtype)
        tokens = subject.tokens(3, asked["block_size"], seed=subject.seed)
        short = tokens[:2, : min(5, tokens.shape[1])].contiguous()
        inventory = take(model, lambda: subject.logits(model, short), asked["n_layer"])
        amplify(model, *ABSENCE, seed=subject.seed)
    shape = Shape(asked["vocab_size"], asked["block_size"], asked["n_head"], asked["n_embd"])
    return Specimen(subject, model, shape, inventory, tokens, dtype)
