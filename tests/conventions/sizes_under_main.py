"""Sizes are globals, and they get their values only where the file is run."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(d_model, 3 * n_heads * d_k)
        self.out = nn.Linear(n_heads * d_k, d_model)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, n_heads, d_k).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * d_k**-0.5 / temper).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, n_heads * d_k))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        self.blocks = nn.ModuleList(Attention() for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


if __name__ == "__main__":
    vocab_size, max_len = 8, 30
    d_model = 512
    d_k = d_v = 64
    n_layers = 6
    n_heads = 8
    temper = 1.0
    model = Transformer()
