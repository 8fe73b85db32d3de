"""Positions and mask are as long as a constant of a third file says."""

import torch
from attention import Head
from sizes import CONTEXT_LENGTH
from torch import nn


class LanguageModel(nn.Module):
    def __init__(self, vocab_size, embedding_size=16, num_layers=2):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, embedding_size)
        self.positions = nn.Embedding(CONTEXT_LENGTH, embedding_size)
        self.layers = nn.ModuleList(Head(embedding_size) for _ in range(num_layers))
        self.out = nn.Linear(embedding_size, vocab_size)

    def forward(self, index):
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1], device=index.device))
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)
