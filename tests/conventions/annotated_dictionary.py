"""A dictionary as configuration, said by its annotation; attention is called by keyword."""

from typing import Any

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width = config["d_model"]
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(embed_dim=width, num_heads=config["num_heads"], batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        T = config["max_seq_len"]
        self.register_buffer("future", torch.full((T, T), float("-inf")).triu(1))

    def forward(self, x):
        T = x.shape[1]
        y = self.norm_1(x)
        x = x + self.attention(query=y, key=y, value=y, attn_mask=self.future[:T, :T])[0]
        return x + self.down(self.up(self.norm_2(x)).relu())


class GPT(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.tokens = nn.Embedding(config["vocab_size"], config["d_model"])
        self.positions = nn.Embedding(config["max_seq_len"], config["d_model"])
        self.blocks = nn.ModuleList([Block(config) for _ in range(config["number_of_transformer_block"])])
        self.head = nn.Linear(config["d_model"], config["vocab_size"])

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
