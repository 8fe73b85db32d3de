"""Padding masks for the checks: [B, T], True for real tokens, ragged on either side."""

from __future__ import annotations

import torch
from torch import Tensor

SIDES = ("none", "right", "left")  # where the padding stands; "none": a mask that marks every token as real


def ragged(B: int, T: int, side: str, *, seed: int = 0) -> Tensor:
    """Rows of 1 to T real tokens, the first of them full and the last with a single one (two rows or more)."""
    if side == "none":
        return torch.ones(B, T, dtype=torch.bool)
    real = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    real[0], real[-1] = (T, real[-1]) if B == 1 else (T, 1)
    return padded(real, T, side)


def padded(real: Tensor, T: int, side: str) -> Tensor:
    """[B, T] for rows of so many real tokens [B]."""
    place = torch.arange(T)
    return place < real[:, None] if side == "right" else place >= T - real[:, None]
