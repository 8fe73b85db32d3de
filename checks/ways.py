"""Way: the code paths on which an invariance law is tried. probes/paths.py brings a model onto each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Way:
    """One way of calling a model. A fault may exist on one code path only. `name` is how it reads in a message."""

    name: str
    training: bool = False
    graph: bool = False  # gradients are recorded, as a training step does
    cached: bool = False  # into an empty key-value cache
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext  # a context entered around the call
    more: dict[str, Any] = field(default_factory=dict)  # further arguments of the call


EVAL = Way("in eval mode")
TRAIN = Way("in train mode", training=True)
CACHED = Way("read into an empty key-value cache", cached=True)
PLAIN_KERNEL = Way("on PyTorch's plain attention kernel", inside=partial(sdpa_kernel, SDPBackend.MATH))
WITHOUT_FUSED = Way("built where PyTorch has no fused attention")  # inside without_fused_attention()
STEP = Way("in train mode with gradients recorded", training=True, graph=True)
CHECKPOINTED = Way("in train mode with activation checkpointing", training=True, graph=True)
LONG_SEQUENCE = Way("in a long sequence")
MANY_ROWS = Way("in a large batch")
AFTER_LONGER = Way("after the model has read a longer sequence")


def training_with(dropout: float) -> Way:
    """In train mode; the model is built with this dropout."""
    return Way(f"in train mode with dropout {dropout:g}", training=True)


def computed_in(dtype: torch.dtype) -> Way:
    """The model is cast to this type."""
    return Way(f"in {str(dtype).removeprefix('torch.')}")


def autocast_to_bfloat16(device: torch.device) -> Way:
    return Way("under autocast to bfloat16", inside=partial(torch.autocast, device.type, dtype=torch.bfloat16))


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Inside, `hasattr(F, "scaled_dot_product_attention")` is False."""
    fused = F.scaled_dot_product_attention
    del F.scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
