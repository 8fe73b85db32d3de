"""Settings under a name that says nothing, of a class that takes any."""

import torch
from torch import nn


class Knobs:
    def __init__(self, **over):
        self.hidden, self.n_heads, self.n_layers, self.seq_len, self.p = 32, 4, 2, 16, 0.0
        for name, value in over.items():
            setattr(self, name, value)


class Layer(nn.Module):
    def __init__(self, z):
        super().__init__()
        self.norm = nn.LayerNorm(z.hidden)
        self.attention = nn.MultiheadAttention(z.hidden, z.n_heads, batch_first=True)
        self.rest = nn.Sequential(nn.Linear(z.hidden, 4 * z.hidden), nn.GELU(), nn.Linear(4 * z.hidden, z.hidden))

    def forward(self, x):
        T = x.shape[1]
        y = self.norm(x)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.rest(x)


class WordModel(nn.Module):
    def __init__(self, n_words, z):
        super().__init__()
        self.words, self.places = nn.Embedding(n_words, z.hidden), nn.Embedding(z.seq_len, z.hidden)
        self.layers = nn.Sequential(*(Layer(z) for _ in range(z.n_layers)))
        self.head = nn.Linear(z.hidden, n_words)

    def forward(self, x):
        return self.head(self.layers(self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))))
