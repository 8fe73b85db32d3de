"""GPT-2 whose one matrix holds key, value and query of head 0, then of head 1, and so on."""

import torch
from torch import nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        k, v, q = self.query_key_value(x).view(B, T, self.heads, 3, C // self.heads).permute(3, 0, 2, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.post_attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads)
        self.input_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = x + self.attention(self.input_norm(x))
        return x + self.mlp(self.post_attention_norm(x))


class Model(nn.Module):
    def __init__(self, vocab_size, max_len, depth, heads, width):
        super().__init__()
        self.head = nn.Linear(width, vocab_size)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.positions = nn.Parameter(torch.randn(1, max_len, width) * 0.02)
        self.tokens = nn.Embedding(vocab_size, width)

    def forward(self, idx):
        return self.head(self.norm(self.blocks(self.tokens(idx) + self.positions[:, : idx.shape[1]])))
