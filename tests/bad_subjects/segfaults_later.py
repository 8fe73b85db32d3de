"""Reads memory at address 0, at its fifth length."""

import ctypes

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        if tokens.shape[1] == 5:
            ctypes.string_at(0)  # here
        return self.head(self.embedding(tokens).cumsum(dim=1))
