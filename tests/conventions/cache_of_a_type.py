"""A cache object is made for a batch, a length and a type of numbers."""

import torch
from torch import nn


class KVCache:
    def __init__(self, batch_size, max_seq_len, n_embd, device, dtype=torch.float32):
        self.held = torch.zeros(batch_size, max_seq_len, n_embd, device=device, dtype=dtype)
        self.length = 0

    def extend(self, x):
        end = self.length + x.shape[1]
        if end > self.held.shape[1]:
            raise ValueError(f"the cache has {self.held.shape[1]} places, {end} are needed")
        self.held[:, self.length : end] = x.detach()
        self.length = end
        return self.held[:, :end]


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.query, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx, cache=None):
        seen = 0 if cache is None else cache.length
        x = self.tokens(idx) + self.positions(torch.arange(seen, seen + idx.shape[1], device=idx.device))
        past = x if cache is None else cache.extend(x)
        S, T = past.shape[1], x.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        weights = (self.query(x) @ past.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1)
        return self.head(x + weights @ past)
