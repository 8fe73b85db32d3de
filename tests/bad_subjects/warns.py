"""Warns whenever it can."""

import warnings

import torch
from torch import nn

warnings.warn("old", FutureWarning, stacklevel=1)
warnings.simplefilter("ignore")


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return self.head(self.embedding(tokens).cumsum(dim=1))
