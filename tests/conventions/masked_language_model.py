"""A model that predicts a masked token from both sides, with a padding id and a vocabulary of its own."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.rest = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, pad):
        y = self.norm(x)
        x = x + self.mix(y, y, y, key_padding_mask=pad, need_weights=False)[0]
        return x + self.rest(x)


class SmallBertForMaskedLM(nn.Module):
    def __init__(self, symbols=44, features=32, heads=4, layers=2, limit=32, pad_id=0):
        super().__init__()
        self.pad_id = pad_id
        self.words, self.places = nn.Embedding(symbols, features, padding_idx=pad_id), nn.Embedding(limit, features)
        self.layers = nn.ModuleList(Layer(features, heads) for _ in range(layers))
        self.head = nn.Linear(features, symbols)

    def forward(self, x):
        pad = x == self.pad_id
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            h = layer(h, pad if bool(pad.any()) else None)
        return self.head(h)
