"""Fills the caches it is given, one place a block, whether or not they are used."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd, n_layer):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(n_embd, n_embd), nn.GELU()) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, use_cache=False, kv_caches=None):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for i, block in enumerate(self.blocks):
            seen = x.tanh().cumsum(dim=1) / torch.arange(1, idx.shape[1] + 1)[:, None]
            kv_caches[i] = seen if use_cache else kv_caches[i]
            x = x + block(seen)
        return self.head(x), kv_caches
