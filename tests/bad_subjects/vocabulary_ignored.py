"""Takes a vocabulary size and gives logits of another."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):  # here
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)
        self.head = nn.Linear(n_embd, 50257)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).cumsum(dim=1))
