"""Sizes as keyword arguments, under names of the Hugging Face kind."""

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


class GPT(nn.Module):
    def __init__(
        self,
        *,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=50257,
        max_position_embeddings=1024,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_position_embeddings, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_attention_heads) for _ in range(num_hidden_layers))
        self.head = nn.Linear(hidden_size, vocab_size)

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, input_ids):
        return self.head(self.hidden(input_ids))
