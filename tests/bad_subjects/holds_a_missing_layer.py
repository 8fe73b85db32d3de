"""A layer of a library that is not installed is put into a Sequential."""

import layers_of_nowhere
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size=17, n_embd=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.Sequential(layers_of_nowhere.Block(n_embd))  # here
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        return self.head(self.blocks(self.embedding(tokens)))
