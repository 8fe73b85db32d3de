"""Padding masks for the checks: [B, T], True for real tokens, padded on either side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..subject import Subject

SIDES = ("none", "right", "left")  # of the padding; "none": a mask that marks every token as real


def ragged(B: int, T: int, side: str, *, seed: int = 0) -> Tensor:
    """Rows of 1 to T real tokens; the first row is full, the last (of two or more) has a single real token."""
    if side == "none":
        return torch.ones(B, T, dtype=torch.bool)
    real = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
    real[0], real[-1] = (T, real[-1]) if B == 1 else (T, 1)
    return padded(real, T, side)


def padded(real: Tensor, T: int, side: str) -> Tensor:
    """[B, T] for rows with these numbers of real tokens [B]."""
    place = torch.arange(T)
    return place < real[:, None] if side == "right" else place >= T - real[:, None]


def with_and_without(subject: Subject, tokens: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """No mask, then one that pads the last two tokens of the last row, each with its name in a sentence."""
    yield "without a mask", None
    if subject.takes_mask:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[-1, -2:] = False
        yield "with a padding mask", mask


def real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with those of padding, which may be anything, set to 0."""
    return logits if mask is None else logits.masked_fill(~mask[..., None], 0.0)
