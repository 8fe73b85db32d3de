"""Places where a program waits for its device: it reads a value of a tensor, or needs a shape that depends on values.

On a CPU there is no waiting, but the places are the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any, Self

import torch

from ..expect import Where
from .dispatch import Dispatch
from .location import line_now

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.equal.default, aten.is_nonzero.default,
}  # fmt: skip


def _picks_by_a_mask(func: Any, args: Any) -> bool:
    """Whether it indexes by a mask, as in x[x > 0]: the size of the result has to be read."""
    indices = args[1] if func is aten.index.Tensor else ()
    return any(index is not None and index.dtype == torch.bool for index in indices)


class Waits(Dispatch):
    """Counts waits by line of the subject's code. On CUDA it also counts, and hides, PyTorch's own warnings of them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.by_line: Counter[Where] = Counter()
        self.said = 0  # PyTorch's own warnings on CUDA, whatever the operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (func in READS or _picks_by_a_mask(func, args)) and (line := line_now()) is not None:
            self.by_line[line] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            self.caught = warnings.catch_warnings(record=True)
            self.warned = self.caught.__enter__()
            warnings.simplefilter("always")
            self.before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(self.before)
            self.said = sum("synchroniz" in str(warning.message) for warning in self.warned or ())
            self.caught.__exit__(*error)
