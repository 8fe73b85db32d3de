"""Takes a value from a file that opens data when it is imported."""

import torch
from data import text
from torch import nn

letters = sorted(set(text)) if isinstance(text, str) else []


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        return self.head(x.tanh().cumsum(dim=1) / torch.arange(1, idx.shape[1] + 1)[:, None])
