"""The cache is kept inside, used on request and emptied by a method."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.query, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)
        self.kept = None

    def reset_cache(self):
        self.kept = None

    def forward(self, idx, use_cache=False):
        seen = self.kept.shape[1] if use_cache and self.kept is not None else 0
        x = self.tokens(idx) + self.positions(torch.arange(seen, seen + idx.shape[1], device=idx.device))
        past = torch.cat((self.kept, x), dim=1) if seen else x
        if use_cache:
            self.kept = past
        S, T = past.shape[1], x.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        weights = (self.query(x) @ past.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1)
        return self.head(x + weights @ past)
