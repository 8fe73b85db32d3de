"""Gives a loss and no logits."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):  # here
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens, targets):
        return nn.functional.cross_entropy(self.head(self.embedding(tokens)).flatten(0, 1), targets.flatten())
