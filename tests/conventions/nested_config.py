"""A configuration inside a configuration."""

from dataclasses import dataclass

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feed_forward(x)


@dataclass
class ModelConfig:
    vocab_size: int = 100
    max_len: int = 64
    width: int = 64
    heads: int = 8
    layers: int = 3


@dataclass
class Config:
    model: ModelConfig
    learning_rate: float = 1e-3


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tokens = nn.Embedding(config.model.vocab_size, config.model.width)
        self.positions = nn.Embedding(config.model.max_len, config.model.width)
        self.blocks = nn.ModuleList(Block(config.model.width, config.model.heads) for _ in range(config.model.layers))
        self.head = nn.Linear(config.model.width, config.model.vocab_size)

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))
