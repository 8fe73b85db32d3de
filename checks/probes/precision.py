"""The floating-point type in which a subject is judged, and the bounds that follow from it.

Laws are judged in float64, where a difference of 1e-9 cannot be rounding. Some subjects refuse float64; others cast to
float32 somewhere (in a norm, a softmax, the angles of rotary positions). These get the bounds of float32, and so do
large ones, for which float64 would take twice the time and the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import Bound, farthest
from ..subject import ABSENCE, Subject
from ..watch.dispatch import Dispatch
from .padding import ragged

FINENESS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Precision:
    """`dtype` is the type of the weights, `inside` the coarsest type in which the forward computes."""

    dtype: torch.dtype
    inside: torch.dtype

    def bound(self, logits: Tensor, *, double: float = 1e-9, single: float = 1e-4) -> Bound:
        """A multiple of these logits' standard deviation. In float32, other shapes change them by up to 1.5e-5."""
        factor = double if self.inside == torch.float64 else single
        return Bound(factor * spread(logits), f"{factor:.0e} standard deviations of the logits, computed in {self}")

    def __str__(self) -> str:
        return str(self.inside).removeprefix("torch.")


def spread(logits: Tensor) -> float:
    """The standard deviation of all logits, the unit of the laws' bounds; 1 if they are constant."""
    return float(logits.detach().double().std().nan_to_num()) or 1.0


def clearly_differ(a: Tensor, b: Tensor) -> bool:
    """Whether logits differ by more than float32 rounding explains."""
    return farthest(a, b) > 1e-5 * spread(a)


def precision(subject: Subject) -> Precision:
    """The finest type in which the subject runs, found once by running it."""
    return subject.once(_probe)


def precision_of_positions(subject: Subject) -> Precision:
    """The same for laws that shift positions: sines that were rounded to float32 turn by angles that are not exact.

    Elsewhere such a table is a constant like any other, and no reason for a wider bound.
    """
    return subject.once(_probe_positions)


def precise(
    subject: Subject, scheme: tuple[float, float] | None = ABSENCE, *, seed: int | None = None, **sizes: Any
) -> nn.Module:
    """An amplified model in the finest type in which the subject runs; the seed is the run's if none is given."""
    seed = subject.seed if seed is None else seed
    return subject.amplified(scheme, seed=seed, dtype=precision(subject).dtype, **sizes)


def shared(subject: Subject) -> nn.Module:
    """One `precise` model for all the cases that a check draws."""
    if not subject.builds_afresh:
        return precise(subject)  # one instance, whose weights and type other checks have changed
    return subject.once(_precise)


def _precise(subject: Subject, /) -> nn.Module:
    return precise(subject)


def _probe(subject: Subject) -> Precision:
    if subject.large:
        return Precision(torch.float32, torch.float32)
    casts = _Casts()
    try:
        model = subject.amplified(dtype=torch.float64)
        with torch.enable_grad(), casts:  # without gradients PyTorch's encoder layers run as one operation
            logits = subject.logits(model, subject.tokens(2, subject.sizes.block_size))
    except Exception:  # whatever a foreign model raises when it mixes two types
        return Precision(torch.float32, torch.float32)
    if casts.mixed:
        return Precision(torch.float32, torch.float32)
    narrow = casts.seen or logits.dtype != torch.float64
    if _overflows_when_cast(subject):
        return Precision(torch.float32, torch.float32)
    return Precision(torch.float64, torch.float32 if narrow else torch.float64)


def _probe_positions(subject: Subject, /) -> Precision:
    found = precision(subject)
    if found.inside != torch.float64:
        return found
    model = precise(subject)
    with torch.no_grad(), Coarsest() as seen:
        subject.logits(model, subject.tokens(1, subject.sizes.block_size))
    rounded = seen.dtype != torch.float64 or any(map(_rounded, _constants(model)))
    return replace(found, inside=torch.float32) if rounded else found


def _constants(model: nn.Module) -> Iterator[Tensor]:
    """What a model holds and does not learn: buffers, frozen parameters, tensors that are plain attributes."""
    yield from model.buffers()
    yield from (parameter for parameter in model.parameters() if not parameter.requires_grad)
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _rounded(constant: Tensor) -> bool:
    """Whether numbers are exact to float32 only; the few that are exact in any type (0, 1, a power of two) are not."""
    numbers = torch.view_as_real(constant) if constant.is_complex() else constant
    if not numbers.is_floating_point() or torch.equal(numbers.bfloat16().to(numbers.dtype), numbers):
        return False
    return torch.equal(numbers.float().to(numbers.dtype), numbers)


def _overflows_when_cast(subject: Subject) -> bool:
    """Whether padding gives NaN in float64 only: its smallest number becomes -inf when cast to float32.

    This happens in `(1.0 - mask) * finfo(x.dtype).min` with a mask of integers.
    """
    if not subject.takes_mask:
        return False
    try:
        return not _survives_padding(subject, torch.float64) and _survives_padding(subject, torch.float32)
    except Exception:  # a refused mask or a mistake: the checks of masks report it
        return False


def _survives_padding(subject: Subject, dtype: torch.dtype) -> bool:
    """Whether logits and gradients are finite with padding on the left, whose tokens can attend to nothing."""
    model = subject.amplified(dtype=dtype)
    tokens = subject.tokens(2, subject.sizes.block_size)
    B, T = tokens.shape
    mask = ragged(B, T, "left").to(tokens.device)
    with torch.enable_grad():
        logits = subject.logits(model, tokens, mask)
        torch.autograd.backward(logits[mask].square().mean())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return all(bool(x.isfinite().all()) for x in (logits, *gradients))


class Coarsest(Dispatch):
    """Sees the coarsest floating-point type of all tensors that are made or written to."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.dtype in FINENESS:
                self.dtype = max(self.dtype, made.dtype, key=FINENESS.index)
        return result


class _Casts(Dispatch):
    """Sees a float64 tensor cast to a coarser floating-point type, or float64 attention with a mask of such a type.

    PyTorch's attention kernel for the CPU accepts a float32 mask with float64 queries and computes wrong results.
    """

    seen = False
    mixed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.seen = self.seen or (result.is_floating_point() and result.dtype != torch.float64)
        if (mask := (kwargs or {}).get("attn_mask")) is not None and args[0].dtype == torch.float64:
            self.mixed = self.mixed or (mask.is_floating_point() and mask.dtype != torch.float64)
        return result
