"""A file of a package: relative imports, and one from the root of the repository."""

import torch
from settings.sizes import Config
from torch import nn

from .layers.block import Block


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config.d_model, config.n_heads) for _ in range(config.n_layers))
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))
