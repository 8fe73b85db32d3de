"""Llama with one matrix of q, k, v, one of gate and value, gains stored minus one, rotary halves in buffers, tied."""

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + self.scale)


def turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads, max_position):
        super().__init__()
        self.H, self.G, self.D = num_heads, max(num_heads // 2, 1), hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, (self.H + 2 * self.G) * self.D, bias=True)
        self.o = nn.Linear(hidden_size, hidden_size, bias=False)
        angles = torch.arange(max_position)[:, None] / 10000 ** (torch.arange(0, self.D, 2) / self.D)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([n * self.D for n in (self.H, self.G, self.G)], dim=-1)
        q, k, v = (y.view(B, T, -1, self.D).transpose(1, 2) for y in (q, k, v))
        q, k = turn(q, self.cos[:T], self.sin[:T]), turn(k, self.cos[:T], self.sin[:T])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class Layer(nn.Module):
    def __init__(self, hidden_size, num_heads, max_position):
        super().__init__()
        self.before, self.after = Norm(hidden_size), Norm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, max_position)
        self.gate_up = nn.Linear(hidden_size, 2 * 3 * hidden_size, bias=False)
        self.down = nn.Linear(3 * hidden_size, hidden_size, bias=False)

    def forward(self, x):
        x = x + self.attention(self.before(x))
        gate, up = self.gate_up(self.after(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class LM(nn.Module):
    def __init__(self, vocab_size, max_position_embeddings, num_hidden_layers, num_attention_heads, hidden_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            Layer(hidden_size, num_attention_heads, max_position_embeddings) for _ in range(num_hidden_layers)
        )
        self.norm, self.unembed = Norm(hidden_size), nn.Linear(hidden_size, vocab_size, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.unembed(self.norm(x))
