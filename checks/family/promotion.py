"""Everything in float64: whoever asks for a narrower type inside gets double precision.

Llama's kin compute norms and angles by `.float()`, and would agree to 1e-7 only. This hides faults of precision, so
what judges those runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
METHODS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class Promoted(TorchFunctionMode):
    """Replaces every narrow floating-point type among the arguments of torch's functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(_wider(a) for a in args)
        kwargs = {name: _wider(a) for name, a in (kwargs or {}).items()}
        return METHODS.get(func, func)(*args, **kwargs)


def _wider(argument: Any) -> Any:
    return WIDER.get(argument, argument) if isinstance(argument, torch.dtype) else argument


@contextmanager
def promoted() -> Iterator[None]:
    """Inside, new floating-point tensors are float64 unless they come from elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promoted():
            yield
    finally:
        torch.set_default_dtype(before)
