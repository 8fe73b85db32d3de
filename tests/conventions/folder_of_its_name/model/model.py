"""In a folder without __init__.py that is called like the file itself, and is imported from as a package."""

import torch
from model.layer import Layer
from torch import nn


class Llama(nn.Module):
    def __init__(self, vocab_size, dim, n_layers, max_position_embeddings):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_position_embeddings, dim)
        self.layers = nn.ModuleList([Layer(dim) for _ in range(n_layers)])
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
