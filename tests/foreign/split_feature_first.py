"""GPT-2 with three matrices of q, k, v whose rows are feature, head (not head, feature), made in the order v, q, k."""

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.d = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        B, T, C = x.shape
        v, q, k = (m(x).view(B, T, C // self.heads, self.heads).permute(0, 3, 1, 2) for m in (self.a, self.b, self.c))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
        return self.d(y.permute(0, 2, 3, 1).reshape(B, T, C))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.one, self.two = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.three, self.four, self.five = Attention(dim, heads), nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x):
        x = x + self.three(self.one(x))
        return self.five(F.gelu(self.four(self.two(x)), approximate="tanh")) + x


class Net(nn.Module):
    def __init__(self, num_tokens, seq_len, depth, heads, dim):
        super().__init__()
        self.x, self.y = nn.Embedding(num_tokens, dim), nn.Embedding(seq_len, dim)
        self.z = nn.ModuleList([Layer(dim, heads) for _ in range(depth)])
        self.w = nn.LayerNorm(dim, bias=False)

    def forward(self, t):
        h = self.x(t) + self.y(torch.arange(t.shape[1], device=t.device))[None]
        for layer in self.z:
            h = layer(h)
        return F.linear(self.w(h), self.x.weight)
