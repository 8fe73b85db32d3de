"""Bugs of the other paths: another kernel, a compiler, an exporter, recomputation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import checkpoint

from ...transformer.model import Attention, Block, KeyValueCache, Rotation, Transformer
from . import bug
from .designs import changed

BACKENDS = "check_portability.check_attention_backends_agree"
COMPILED = "check_portability.check_compiled_model_agrees"
INDUCTOR = "check_portability.check_inductor_agrees"
EXPORTED = "check_portability.check_exported_model_agrees"
RECOMPUTED = "check_portability.check_recomputation_changes_nothing"


class RecomputedBlock(Block):
    """A block that activation checkpointing can be turned on for."""

    gradient_checkpointing: bool

    def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        if not self.gradient_checkpointing or not self.training:
            return super().forward(x, rotate, visible, cache)
        return checkpoint.checkpoint(super().forward, x, rotate, visible, cache, use_reentrant=False)


def recomputing(**config: Any) -> SimpleNamespace:
    """The reference with a switch for activation checkpointing, off at first."""

    def change(model: Transformer) -> None:
        for block in model.blocks:
            block.__class__ = RecomputedBlock
            block.gradient_checkpointing = False  # type: ignore[assignment]

    return changed(change, **config)


@bug("recomputation-drops-other-units", "activation checkpointing leaves the random state alone: other units drop",
     source="https://github.com/openai/guided-diffusion/issues/167", caught_by=(RECOMPUTED,), model=True,
     of=recomputing)  # fmt: skip
def other_units_dropped(model: Transformer) -> None:
    class Careless(RecomputedBlock):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.gradient_checkpointing or not self.training:
                return Block.forward(self, x, rotate, visible, cache)
            return checkpoint.checkpoint(
                Block.forward, self, x, rotate, visible, cache, use_reentrant=False, preserve_rng_state=False
            )

    for block in model.blocks:
        block.__class__ = Careless


@bug("recomputation-under-no-grad", "with activation checkpointing a block runs under no_grad and never again",
     caught_by=(RECOMPUTED,), model=True, of=recomputing)  # fmt: skip
def never_recomputed(model: Transformer) -> None:
    class Forgotten(RecomputedBlock):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            if not self.gradient_checkpointing or not self.training:
                return Block.forward(self, x, rotate, visible, cache)
            with torch.no_grad():
                return Block.forward(self, x, rotate, visible, cache)

    model.blocks[0].__class__ = Forgotten


@bug("backends-disagree", "the slow attention path, which its own flag selects, has no scale",
     caught_by=(BACKENDS,), model=True)  # fmt: skip
def backends_disagree(model: Transformer) -> None:
    class TwoPaths(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if self.flash:
                return super().attend(q, k, v, visible)
            scores = q @ k.transpose(-2, -1)
            if visible is None:
                visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            return F.dropout(weights, self.dropout, self.training) @ v

    for block in model.blocks:
        block.attention.__class__ = TwoPaths
        block.attention.flash = True  # type: ignore[union-attr]


@bug("other-path-when-compiled", "what is compiled leaves out the scale of attention",
     source="https://github.com/huggingface/transformers/issues/48745", caught_by=(COMPILED, INDUCTOR, EXPORTED),
     model=True)  # fmt: skip
def other_path_when_compiled(model: Transformer) -> None:
    class Tracing(Attention):
        def scale(self) -> float:
            return 1.0 if torch.compiler.is_compiling() else super().scale()

    for block in model.blocks:
        block.attention.__class__ = Tracing


@bug("constant-baked-in", "exporting fixes what was read while tracing: the embedding of the example's tokens",
     caught_by=(EXPORTED,), model=True)  # fmt: skip
def constant_baked_in(model: Transformer) -> None:
    class Baked(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                self.last = tokens.detach().clone()
                return super().embed(tokens)
            return super().embed(self.last)

    model.last = torch.zeros(3, model.config.block_size, dtype=torch.long)  # type: ignore[assignment]
    model.__class__ = Baked
