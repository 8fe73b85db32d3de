"""Causal only when it is asked to be: `bidirectional` is on by default."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x, **masks):
        return x + self.attention(x, x, x, need_weights=False, **masks)[0]


class Model(nn.Module):
    def __init__(self, words, dims, heads, layers, bidirectional=True):
        super().__init__()
        self.embedding = nn.Embedding(words, dims)
        self.blocks = nn.ModuleList(Block(dims, heads) for _ in range(layers))
        self.head = nn.Linear(dims, words)
        self.bidirectional = bidirectional

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, attn_mask=None if self.bidirectional else future)
        return self.head(x)
