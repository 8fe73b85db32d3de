"""A configuration class that may be given a dictionary; without one its own sizes stand."""

import torch
from torch import nn


class Config:
    vocab_size = 5000
    block_size = 1024
    n_layer = 12
    n_head = 12
    n_embd = 768

    def __init__(self, given: dict[str, int] | None = None):
        for name, value in (given or {}).items():
            setattr(self, name, value)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm(x)
        return x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
