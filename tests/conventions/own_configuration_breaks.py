"""Its configuration's own defaults break its constructor; with others it is built."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    vocab_size: int = 50
    block_size: int = 32
    n_embd: int = 16
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.places = nn.Embedding(config.block_size, config.n_embd)
        self.shift = nn.Parameter(torch.zeroes(config.n_embd)) if config.bias else None  # no such function
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1], device=idx.device))
        count = torch.arange(1, idx.shape[1] + 1, device=idx.device)[:, None]
        return self.head((x.tanh().cumsum(dim=1) / count).tanh())
