"""Mistakes that learning by heart shows: what can never be said, and what is never looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from ...transformer.model import Attention, KeyValueCache, Transformer
from . import bug

RANDOM = "check_memorization.check_memorizes_a_random_string"
SENTENCE = "check_sanity.check_memorizes_the_sentence"
MIDDLE = "check_memorization.check_memorizes_two_strings_with_the_same_middle"


@bug(
    "vocabulary-masked-too-far",
    "the upper half of the vocabulary is taken for its padding",
    caught_by=(RANDOM, SENTENCE),
    model=True,
)
def real_ids_taken_for_padding(model: Transformer) -> None:
    class HalfMasked(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            logits = super().forward(tokens, mask, cache)
            padding = torch.arange(logits.shape[-1], device=logits.device) >= (logits.shape[-1] + 1) // 2
            return logits.masked_fill(padding, -torch.inf)

    model.__class__ = HalfMasked


@bug(
    "attention-forgets-the-past",
    "each token attends to itself and to nothing before it",
    caught_by=(MIDDLE,),
    model=True,
)
def past_not_seen(model: Transformer) -> None:
    class Itself(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            T, S = q.shape[2], k.shape[2]
            itself = torch.arange(S, device=q.device) == torch.arange(S - T, S, device=q.device)[:, None]
            return super().attend(q, k, v, itself)

    for block in model.blocks:
        block.attention.__class__ = Itself


@bug(
    "probabilities-for-logits",
    "the model ends in a softmax, and cross entropy makes another",
    source="https://openillumi.com/en/en-pytorch-crossentropy-logits-nllloss-mechanism",
    caught_by=(SENTENCE,),
    model=True,
)
def probabilities_for_logits(model: Transformer) -> None:
    class Softmax(Transformer):
        def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
            return super().forward(tokens, mask, cache).softmax(-1)

    model.__class__ = Softmax
