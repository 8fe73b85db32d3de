"""Options that change nothing: one that no code reads, one that is computed with and then left out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import ModelConfig, RotaryPositions, Transformer
from ..check_options import check_every_option_has_an_effect
from . import bug
from .damage import norms


@bug(
    "an option of the configuration is read by no code: the norms keep their own epsilon",
    check_every_option_has_an_effect,
)
def option_never_read(model: Transformer) -> None:
    for norm in norms(model):
        norm.eps = ModelConfig.norm_eps


@bug(
    "the rotary frequencies of the declared base are computed, and those of the usual base are returned",
    check_every_option_has_an_effect,
    positions="rotary",
)
def option_computed_and_dropped(model: Transformer) -> None:
    class Usual(RotaryPositions):
        def angles(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
            super().angles(positions, dtype)
            declared, self.base = self.base, ModelConfig.rope_base
            usual = super().angles(positions, dtype)
            self.base = declared
            return usual

    model.positions.__class__ = Usual
