"""A dictionary of dictionaries."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg["n_embd"]
        self.tokens = nn.Embedding(cfg["vocab_size"], width)
        self.positions = nn.Embedding(cfg["block_size"], width)
        self.attention = nn.MultiheadAttention(width, cfg["attention"]["n_head"], batch_first=True)
        self.causal = cfg["attention"]["is_causal"]
        self.head = nn.Linear(width, cfg["vocab_size"])

    def forward(self, idx):
        T = idx.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(T))
        mask = torch.ones(T, T, dtype=torch.bool).triu(1) if self.causal else None
        return self.head(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])
