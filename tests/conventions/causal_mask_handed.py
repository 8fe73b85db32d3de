"""Causal only if it is handed a causal mask."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x, **masks):
        return x + self.attention(x, x, x, need_weights=False, **masks)[0]


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size)

    def hidden(self, idx, **masks):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x, **masks)
        return x

    def forward(self, idx, mask=None):
        return self.head(self.hidden(idx, attn_mask=None if mask is None else ~mask))


def next_token(model, idx):
    T = idx.shape[1]
    keep = torch.ones(T, T, dtype=torch.bool).tril()
    return model(idx, mask=keep)[:, -1].argmax(-1)
