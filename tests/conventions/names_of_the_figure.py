"""Sizes as the paper's figure has them, `Nx` layers of `chan_dim` channels, each with a default of its own."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, chan_dim, n_heads):
        super().__init__()
        self.norm = nn.LayerNorm(chan_dim)
        self.attention = nn.MultiheadAttention(chan_dim, n_heads, batch_first=True)

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = self.norm(x)
        return x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]


class GPT(nn.Module):
    def __init__(self, n_vocab, chan_dim=512, n_heads=4, Nx=16, max_context=10000):
        super().__init__()
        self.tokens = nn.Embedding(n_vocab, chan_dim)
        self.positions = nn.Embedding(max_context, chan_dim)
        self.stack = nn.ModuleList(Attention(chan_dim, n_heads) for _ in range(Nx))
        self.head = nn.Linear(chan_dim, n_vocab)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for layer in self.stack:
            x = layer(x)
        return self.head(x)
