"""A cache is an object of a class in the file."""

import torch
from torch import nn


class KVCache:
    def __init__(self):
        self.past = None

    def extend(self, x):
        self.past = x if self.past is None else torch.cat((self.past, x), dim=1)
        return self.past


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.query, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx, cache=None):
        seen = 0 if cache is None or cache.past is None else cache.past.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(seen, seen + idx.shape[1], device=idx.device))
        past = x if cache is None else cache.extend(x)
        S, T = past.shape[1], x.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        weights = (self.query(x) @ past.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1)
        return self.head(x + weights @ past)
