"""Cannot read as many tokens as its block size."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd, block_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)
        self.block_size = block_size

    def forward(self, tokens):
        if tokens.shape[1] >= self.block_size:
            raise IndexError("one position too many")  # here
        return self.head(self.embedding(tokens).cumsum(dim=1))
