"""What benchmarks run: sizes of a model with the batch of a step, and whether this machine can take them."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..subject import Sizes, Subject
from .matrix_products import weight_shapes

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
        """About what both models, their optimizers and one step's activations take."""
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
# Along each axis the load, and how the axis is written in "T^1.1".
AXES = {
    "length": ("T", [replace(GROWN, sizes=replace(GROWN.sizes, block_size=n)) for n in (64, 128, 256, 512)]),
    "batch": ("B", [replace(GROWN, B=n) for n in (2, 4, 8, 16)]),
    "width": ("C", [replace(GROWN, sizes=replace(GROWN.sizes, n_embd=n)) for n in (64, 128, 256, 512)]),
    "depth": ("L", [replace(GROWN, sizes=replace(GROWN.sizes, n_layer=n)) for n in (1, 2, 4, 8)]),
}


def extent(axis: str, load: Load) -> int:
    """How far a load goes along an axis of AXES."""
    return {"length": load.T, "batch": load.B, "width": load.sizes.n_embd, "depth": load.sizes.n_layer}[axis]


def loads_of(subject: Subject, loads: Sequence[Load] | None = None) -> list[Load]:
    """The loads, LOADS by default, at the sizes that the subject can take; its own where it takes no others."""
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
    other = copy.copy(subject)
    other.sizes = load.sizes if subject.can_vary("dropout") else replace(load.sizes, dropout=subject.sizes.dropout)
    return other


def too_large(load: Load, device: torch.device) -> str | None:
    """Why the device cannot hold a load; None if it can, or if nobody knows."""
    free = free_bytes(device)
    if free is None or load.bytes <= free:
        return None
    return f"about {load.bytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"


def free_bytes(device: torch.device) -> int | None:
    """Of a CUDA device, or of the machine, what can still be allocated; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = Path("/proc/meminfo")
    if available.exists():
        lines = dict(line.split(":", 1) for line in available.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def compiler_missing(device: torch.device) -> str | None:
    """Why Inductor can compile nothing for a device here; None if it can."""
    if device.type == "cpu":
        found = any(map(shutil.which, ("g++", "c++", "clang++", "cl")))
        return None if found else "no C++ compiler here"
    return None if importlib.util.find_spec("triton") else f"no triton here, which compiles for {device.type}"
