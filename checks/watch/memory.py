"""Memory held by tensors while something runs, beyond what was held before: exact, and on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..expect import Where
from .dispatch import Dispatch
from .location import line_now


class Held(Dispatch):
    """Counts the bytes of tensors made inside that are still alive: `now`, and at the `peak`.

    It sees the results of operations, not the working memory of a kernel. A GPU's allocator counts both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # of live storages, by address; 0 for those made before
        self.now = self.peak = 0
        self.largest: tuple[int, tuple[int, ...], Where | None] = (0, (), None)  # bytes, shape, line that made it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._count(tensor, made=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._count(tensor, made=True)
        return out

    def _count(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes() if made else 0
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            if self.sizes[key] > self.largest[0]:
                self.largest = self.sizes[key], tuple(tensor.shape), line_now()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes held while it runs, beyond those held before. On CUDA and XPU the allocator counts them."""
    if device.type not in ("cuda", "xpu"):
        held = Held()
        with held:
            run()
        return held.peak
    allocator = getattr(torch, device.type)
    allocator.synchronize(device)
    allocator.reset_peak_memory_stats(device)
    before = allocator.memory_allocated(device)
    run()
    allocator.synchronize(device)
    return int(allocator.max_memory_allocated(device)) - int(before)
