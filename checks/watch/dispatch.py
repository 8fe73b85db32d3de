"""`Dispatch`: a TorchDispatchMode that does without PyTorch's compiler, whose import takes most of a second."""

from __future__ import annotations

import sys
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode whose own code torch.compile in the model leaves alone, as that of every mode.

    PyTorch marks the code of every mode for that, and the mark imports the compiler. This marks it only when the
    compiler is there.
    """

    marked = False

    def __init_subclass__(cls) -> None:
        """Leaves out PyTorch's own, which sets the mark."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        mode = type(self)
        if "torch._dynamo" in sys.modules and not mode.marked:
            mode.__torch_dispatch__ = torch.compiler.disable(mode.__torch_dispatch__)  # type: ignore[method-assign, no-untyped-call]
            mode.marked = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
