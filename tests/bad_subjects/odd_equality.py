"""Defines equality in a way that is of no use."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def __eq__(self, other):
        return torch.ones(2)

    __hash__ = nn.Module.__hash__

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(dim=1))
