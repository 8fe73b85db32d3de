"""What benchmarks run: model sizes with a batch size, whether they fit on this machine, and their matrix products.

The matrix products of a GPT-2 shaped model are the lower bound: no implementation can do without them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..subject import Sizes, Subject
from .timing import in_turn

NAMES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
MODELS = 2  # the subject and the reference are held at once
BYTES_A_PARAMETER = 16  # weight, gradient and Adam's two averages, in float32


@dataclass(frozen=True)
class Load:
    """A model's sizes and the batch of a step."""

    name: str
    sizes: Sizes
    B: int
    large: bool = False  # for accelerators, or with --slow

    @property
    def T(self) -> int:
        return self.sizes.block_size

    @property
    def tokens(self) -> int:
        return self.B * self.T

    @property
    def bytes(self) -> int:
        """Roughly the memory of both models, their optimizers and one step's activations."""
        sizes = self.sizes
        parameters = sum(out * into for out, into in weight_shapes(sizes)) + self.T * sizes.n_embd
        activations = 4 * self.tokens * (20 * sizes.n_layer * sizes.n_embd + 3 * sizes.vocab_size)
        return MODELS * BYTES_A_PARAMETER * parameters + activations

    def __str__(self) -> str:
        return self.name


def load(name: str, V: int, T: int, L: int, H: int, C: int, *, B: int, large: bool = False) -> Load:
    return Load(name, Sizes(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C), B, large)


TINY = load("0.1M", 65, 64, 2, 2, 64, B=8)  # named by the parameters of a GPT-2 of these sizes
SMALL = load("0.8M", 65, 128, 4, 4, 128, B=8)
TEN = load("10.7M", 65, 256, 6, 6, 384, B=8, large=True)
LOADS = (
    TINY,
    SMALL,
    TEN,
    load("25M", 65, 512, 8, 8, 512, B=4, large=True),
    load("124M", 50257, 1024, 12, 12, 768, B=1, large=True),
)
GROWN = load("growing", 65, 128, 2, 4, 128, B=4)
# By axis: the letter that stands for it in "T^1.1", and the loads that grow along it.
AXES = {
    "length": ("T", [replace(GROWN, sizes=replace(GROWN.sizes, block_size=n)) for n in (64, 128, 256, 512)]),
    "batch": ("B", [replace(GROWN, B=n) for n in (2, 4, 8, 16)]),
    "width": ("C", [replace(GROWN, sizes=replace(GROWN.sizes, n_embd=n)) for n in (64, 128, 256, 512)]),
    "depth": ("L", [replace(GROWN, sizes=replace(GROWN.sizes, n_layer=n)) for n in (1, 2, 4, 8)]),
}


def extent(axis: str, load: Load) -> int:
    """The size of a load along one of the AXES."""
    return {"length": load.T, "batch": load.B, "width": load.sizes.n_embd, "depth": load.sizes.n_layer}[axis]


def loads_of(subject: Subject, loads: Sequence[Load] | None = None) -> list[Load]:
    """The loads (by default LOADS) at sizes that the subject can take; its own sizes where none can be changed."""
    return list(dict.fromkeys(fitted(subject, load) for load in loads or LOADS))


def fitted(subject: Subject, load: Load) -> Load:
    own = {name: getattr(subject.sizes, name) for name in NAMES if not subject.can_vary(name)}
    if not own:
        return load
    if len(own) == len(NAMES):
        return Load("own sizes", replace(subject.sizes, dropout=0.0), B=8)
    sizes = replace(load.sizes, **own)
    if sizes.n_embd % sizes.n_head:
        sizes = replace(sizes, n_embd=subject.sizes.n_embd, n_head=subject.sizes.n_head)
    return replace(load, name=f"like {load.name}", sizes=sizes)


def sized(subject: Subject, load: Load) -> Subject:
    """The subject at the sizes of a load."""
    varies = subject.can_vary("dropout")
    return subject.changed(sizes=load.sizes if varies else replace(load.sizes, dropout=subject.sizes.dropout))


def too_large(load: Load, device: torch.device) -> str | None:
    """Why a load does not fit into the device's memory; None if it does, or if the free memory is unknown."""
    free = free_bytes(device)
    if free is None or load.bytes <= free:
        return None
    return f"needs about {load.bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on a CUDA device, or on this machine; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = Path("/proc/meminfo")
    if available.exists():
        lines = dict(line.split(":", 1) for line in available.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def compiler_missing(device: torch.device) -> str | None:
    """Why Inductor cannot compile for this device here; None if it can."""
    if device.type == "cpu":
        found = any(map(shutil.which, ("g++", "c++", "clang++", "cl")))
        return None if found else "no C++ compiler was found"
    return None if importlib.util.find_spec("triton") else f"triton, which compiles for {device.type}, is not installed"


# -- matrix products: attention's in full, though a causal kernel needs only half of them


def weight_shapes(sizes: Sizes) -> list[tuple[int, int]]:
    """[out, in] of every weight matrix, layer by layer: qkv, output, in, out; then the head."""
    C = sizes.n_embd
    return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * sizes.n_layer + [(sizes.vocab_size, C)]


def training_products(
    sizes: Sizes, B: int, T: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One training step's products on tensors of their own, forward and backward, when called."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    shapes = weight_shapes(sizes)
    weights = {shape: drawn(*shape) for shape in set(shapes)}
    activations = {width: drawn(B * T, width) for shape in shapes for width in shape}
    head_width = sizes.n_embd // sizes.n_head
    q, k, v = (drawn(B * sizes.n_head, T, head_width) for _ in range(3))
    scores = drawn(B * sizes.n_head, T, T)

    @torch.no_grad()
    def run() -> None:
        for out, into in shapes:
            x, gradient, weight = activations[into], activations[out], weights[out, into]
            x @ weight.T, gradient @ weight, gradient.T @ x
        for _ in range(sizes.n_layer):
            q @ k.transpose(1, 2), scores @ v  # forward; then the gradients of v, the scores, q and k
            scores.transpose(1, 2) @ q, q @ v.transpose(1, 2), scores @ k, scores.transpose(1, 2) @ q

    return run


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "row by row": lambda matrix: matrix,
    "column by column": lambda matrix: matrix.t().contiguous().t(),
}


def decoding_products(
    sizes: Sizes, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """One token's matrix-vector products when called: every weight read once, which is what bounds decoding.

    The weights are stored in the one of the LAYOUTS that is fastest here.
    """
    products = {name: vector_products(sizes, lay, device, dtype) for name, lay in LAYOUTS.items()}
    seconds = in_turn(products, 7, device=device)
    return products[min(products, key=lambda name: statistics.median(seconds[name]))]


def vector_products(
    sizes: Sizes, lay: Callable[[Tensor], Tensor], device: torch.device | str, dtype: torch.dtype
) -> Callable[[], None]:
    matrices = [lay(torch.randn(shape, device=device, dtype=dtype)) for shape in weight_shapes(sizes)]
    vectors = [torch.randn(matrix.shape[1], device=device, dtype=dtype) for matrix in matrices]

    @torch.inference_mode()
    def run() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            matrix @ vector

    return run
