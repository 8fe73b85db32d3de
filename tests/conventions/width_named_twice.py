"""A dictionary that names the width twice: `hidden_size` beside `n_embd` is no feed-forward width here."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config["n_embd"])
        self.attention = nn.MultiheadAttention(config["hidden_size"], config["n_head"], batch_first=True)

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = self.norm(x)
        return x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.positions = nn.Embedding(config["block_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Attention(config) for _ in range(config["n_layer"]))
        self.head = nn.Linear(config["hidden_size"], config["vocab_size"])

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
