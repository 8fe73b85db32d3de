"""Bugs that several processes show: each sees its own part of a batch, and its own past."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...transformer.model import Transformer
from . import bug

TWO = "check_distributed.check_two_processes_train_as_one"


@bug("parameter-never-used", "a second head for a loss that was given up is still there, and nothing calls it",
     source="https://github.com/pytorch/pytorch/issues/43259",
     caught_by=(TWO, "check_gradients.check_every_parameter_gets_a_gradient"), model=True)  # fmt: skip
def parameter_never_used(model: Transformer) -> None:
    model.second_head = nn.Linear(model.config.n_embd, 2)


@bug("running-statistics-in-forward", "in training the embedding is centred by a running mean of the batches so far",
     caught_by=(TWO,), model=True)  # fmt: skip
def running_statistics(model: Transformer) -> None:
    class Centred(Transformer):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            mean = cast(Tensor, self.running_mean)
            if self.training:
                mean.lerp_(x.detach().mean((0, 1)), 0.5)
            return x - mean.clone()

    model.__class__ = Centred
    model.register_buffer("running_mean", torch.zeros(model.config.n_embd))


@bug("normalized-over-the-batch", "in training the last hidden states are normalized over the rows of the batch",
     caught_by=(TWO,), model=True)  # fmt: skip
def normalized_over_the_batch(model: Transformer) -> None:
    class Batch(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x - x.mean(0, keepdim=True) if self.training and len(x) > 1 else x

    model.norm.__class__ = Batch
