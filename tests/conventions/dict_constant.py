"""A dictionary as configuration, a constant of the file."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feed_forward(x)


CONFIG = {"vocab_size": 65, "seq_len": 256, "d_model": 384, "num_heads": 6, "num_layers": 6}


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config["vocab_size"], config["d_model"])
        self.positions = nn.Embedding(config["seq_len"], config["d_model"])
        self.blocks = nn.ModuleList(Block(config["d_model"], config["num_heads"]) for _ in range(config["num_layers"]))
        self.head = nn.Linear(config["d_model"], config["vocab_size"])

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))
