"""A width is read from a file that works when it is imported, and is not run."""

from settings import cfg
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, dim):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.up = nn.Linear(dim, cfg.model.wide)  # here
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens):
        return self.head(self.tokens(tokens))
