"""A configuration that is a NamedTuple, with a window."""

from typing import NamedTuple

import torch
from torch import nn


class NearConfig(NamedTuple):
    vocab_size: int = 90
    hidden_size: int = 32
    num_layers: int = 1
    num_heads: int = 4
    block_size: int = 64
    window: int = 4


class Near(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.window, self.heads = config.window, config.num_heads
        self.norm = nn.LayerNorm(config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (p.view(B, T, self.heads, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(1 - self.window)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return x + self.out(y.transpose(1, 2).reshape(B, T, C))


class NearModel(nn.Module):
    def __init__(self, config=NearConfig()):  # noqa: B008
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.block_size, config.hidden_size)
        self.layers = nn.ModuleList(Near(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
