"""Raises when it is built."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)
        raise ValueError("the width must be 7")  # here

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(dim=1))
