"""Wrong embeddings and heads: their scale, the logits, and the weights that the two should share."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ...transformer.model import KeyValueCache, LearnedPositions, Transformer
from ..check_contract import check_logits_have_shape, check_ties_survive
from ..check_initialization import check_loss_starts_near_uniform
from ..check_memorization import check_memorizes_a_random_string
from ..check_sanity import check_memorizes_the_sentence
from ..check_spec import check_logits_agree, check_weights_are_the_familys
from . import bug
from .damage import GPT2, redefine

# -- the embedding


@bug(
    "token embeddings are multiplied by √C, which neither GPT-2 nor Llama does",
    check_logits_agree,
    source="https://github.com/TensorAuto/OpenTau/pull/179",
    **GPT2,
)
def embedding_scale_missing_doubled_rounded(model: Transformer) -> None:
    def embed(self: Transformer, tokens: Tensor) -> Tensor:
        return Transformer.embed(self, tokens) * math.sqrt(self.config.n_embd)

    redefine(model, embed=embed)


@bug("token and position embeddings together are multiplied by √C", check_logits_agree, positions="learned", **GPT2)
def embedding_scale_after_positions(model: Transformer) -> None:
    def add(self: LearnedPositions, x: Tensor, positions: Tensor) -> Tensor:
        return LearnedPositions.add(self, x, positions) * math.sqrt(x.shape[-1])

    redefine(model.positions, add=add)


# -- the logits


@bug("logits are divided by √C, which neither GPT-2 nor Llama does", check_logits_agree, **GPT2)
def logits_scaled(model: Transformer) -> None:
    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        return Transformer.forward(self, *args, **kwargs) / math.sqrt(self.config.n_embd)

    redefine(model, forward=forward)


@bug("logits are multiplied by C: an untrained model is far too confident", check_loss_starts_near_uniform)
def logits_multiplied_by_width(model: Transformer) -> None:
    class Multiplied(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.shape[-1]

    model.head.__class__ = Multiplied


@bug("logits are capped at 30 tanh(x / 30), as in Gemma 2 but not in GPT-2 or Llama", check_logits_agree, **GPT2)
def logit_softcap_undeclared(model: Transformer) -> None:
    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        return 30 * torch.tanh(Transformer.forward(self, *args, **kwargs) / 30)

    redefine(model, forward=forward)


@bug("logits are rounded to integers", check_logits_have_shape)
def logits_rounded(model: Transformer) -> None:
    class Rounded(Transformer):
        def forward(self, *given: Any) -> Tensor:
            return super().forward(*given).round().long()

    model.__class__ = Rounded


@bug(
    "the model ends in a softmax, and cross entropy applies a second one",
    check_memorizes_the_sentence,
    source="https://openillumi.com/en/en-pytorch-crossentropy-logits-nllloss-mechanism",
)
def probabilities_for_logits(model: Transformer) -> None:
    class Softmax(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            return super().forward(tokens, mask, cache).softmax(-1)

    model.__class__ = Softmax


@bug("half of the vocabulary is masked out as padding", check_memorizes_a_random_string, check_memorizes_the_sentence)
def vocabulary_masked_too_far(model: Transformer) -> None:
    class HalfMasked(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            logits = super().forward(tokens, mask, cache)
            padding = torch.arange(logits.shape[-1], device=logits.device) >= (logits.shape[-1] + 1) // 2
            return logits.masked_fill(padding, -torch.inf)

    model.__class__ = HalfMasked


# -- weights shared by embedding and head


@bug(
    "the head starts as a copy of the embedding instead of sharing it: the two drift apart",
    check_ties_survive,
    check_weights_are_the_familys,
    source="https://github.com/TransformerLensOrg/TransformerLens/issues/1725",
    **GPT2,
)
def tied_weights_broken(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())


@bug(
    "weights are no longer tied once the model is converted to another dtype",
    check_ties_survive,
    source="https://github.com/NVIDIA-NeMo/Automodel/pull/2213",
)
def tie_lost_by_wrapping(model: Transformer) -> None:
    class Parted(Transformer):
        def double(self) -> Self:
            super().double()
            self.head.weight = nn.Parameter(self.head.weight.detach().clone())
            return self

    model.__class__ = Parted


@bug("head and embedding are two parameters on one storage: each gets part of the gradient", check_ties_survive)
def tie_by_storage(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach())
