"""A trainer small enough for exact comparisons, on sequences of different lengths."""

from __future__ import annotations

import torch

from transformer_checks.transformer.data import pad_batch
from transformer_checks.transformer.model import ModelConfig, Transformer
from transformer_checks.transformer.train_config import TrainConfig
from transformer_checks.transformer.trainer import Trainer, next_token_objective

SMALL = dict(vocab_size=9, block_size=8, n_embd=8, n_head=2)
PLAIN = TrainConfig(
    steps=6, stop_loss=None, batch_size=3, learning_rate=0.01, warmup_steps=0, clip_norm=None, beta2=0.95
)


class Rows:
    """Random sequences of different lengths; the first `skip` targets are masked out of the loss."""

    def __init__(self, lengths=(3, 8, 2, 5, 9, 4, 6), skip=1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.train = [torch.randint(9, (n,), generator=generator).tolist() for n in lengths]
        self.validation = self.train[:3]
        self.skip = skip

    def batch(self, rows):
        return pad_batch(rows, self.skip)


def trainer(config=PLAIN, *, data=None, model=None, seed=0, folder=None, objective=next_token_objective, **sizes):
    """A trainer in float64, so that equal computations differ only by rounding of about 1e-16."""
    if model is None:
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**{**SMALL, **sizes})).double()
    return Trainer(model, data or Rows(), config, objective, folder=folder)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(left: dict, right: dict, tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
