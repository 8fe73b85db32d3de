"""Imports a library that is not here, and then reads a file that is not here either."""

from pathlib import Path

import logs_of_nowhere
import torch
from torch import nn

book = Path("a_book_that_is_not_here.txt").read_bytes()


@logs_of_nowhere.watched
class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        x = (self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))).tanh()
        return self.head(x.cumsum(dim=1) / torch.arange(1, idx.shape[1] + 1, device=idx.device)[:, None])
