"""Sizes by the field's letters, and one that the file gives where it uses its model."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, V: int, T_max: int, D: int, H: int, stretch: float):
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.positions = nn.Embedding(T_max, D)
        self.block = nn.TransformerEncoderLayer(D, H, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(D, V)
        self.stretch = stretch

    def forward(self, ids):
        T = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(T)) * self.stretch
        return self.head(self.block(x, torch.ones(T, T, dtype=torch.bool).triu(1)))


if __name__ == "__main__":
    print(Model(V=100, T_max=64, D=128, H=4, stretch=0.5))
