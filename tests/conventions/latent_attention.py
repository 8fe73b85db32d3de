"""Keys for every head, though the number of key heads is an argument; the width of a head is None, and needed."""

import torch
from torch import nn
from torch.nn import functional as F


class Config:
    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=64, head_dim: int | None = None,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.max_position_embeddings, self.head_dim = max_position_embeddings, head_dim


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.repeats = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        self.scale, inner = config.head_dim**-0.5, config.num_attention_heads * config.head_dim
        self.query, self.latent = nn.Linear(config.hidden_size, inner), nn.Linear(config.hidden_size, 8)
        self.up, self.out = nn.Linear(8, 2 * inner), nn.Linear(inner, config.hidden_size)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.heads, -1).transpose(1, 2)
        k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.up(self.latent(x)).chunk(2, dim=-1))
        k, v = k.repeat_interleave(self.repeats, dim=1), v.repeat_interleave(self.repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class Latent(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)
