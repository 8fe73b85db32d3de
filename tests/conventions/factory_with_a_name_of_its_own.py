"""A function that makes a model from sizes; it gives a configuration as well."""

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


class Assembled(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.tokens = nn.Embedding(parts[0], parts[2])
        self.positions = nn.Embedding(parts[1], parts[2])
        self.blocks = nn.ModuleList(Block(parts[2], parts[3]) for _ in range(parts[4]))
        self.head = nn.Linear(parts[2], parts[0])

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))


def make_model(vocab, max_len=128, d_model=512, h=8, N=6):
    return Assembled((vocab, max_len, d_model, h, N)), {"d_model": d_model}
