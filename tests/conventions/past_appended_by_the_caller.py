"""Each call returns the keys of its own tokens only; who calls appends them to the past."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.query, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx, past=None):
        before = 0 if past is None else past.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(before, before + idx.shape[1], device=idx.device))
        every = x if past is None else torch.cat((past, x), dim=1)
        S, T = every.shape[1], x.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        weights = (self.query(x) @ every.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1)
        return self.head(x + weights @ every), x
