"""A small Llama as students write it: rotary angles as complex numbers, RMSNorm, SwiGLU."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Args:
    vocab_size: int = 16
    dim: int = 32
    n_layers: int = 2
    n_heads: int = 4
    max_seq_len: int = 32
    hidden: int = 64
    eps: float = 1e-5


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def angles(head_dim, length, base=10000.0):
    freqs = 1.0 / base ** (torch.arange(0, head_dim, 2) / head_dim)
    table = torch.outer(torch.arange(length), freqs)
    return torch.polar(torch.ones_like(table), table)


def rotate(x, turn):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[None, :, None, :]).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, args.dim, bias=False)
        self.wv = nn.Linear(args.dim, args.dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, turn):
        B, T, C = x.shape
        q, k, v = (w(x).view(B, T, self.n_heads, C // self.n_heads) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turn), rotate(k, turn)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.w1 = nn.Linear(args.dim, args.hidden, bias=False)
        self.w2 = nn.Linear(args.hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden, bias=False)
        self.norm1 = RMSNorm(args.dim, args.eps)
        self.norm2 = RMSNorm(args.dim, args.eps)

    def forward(self, x, turn):
        x = x + self.attention(self.norm1(x), turn)
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList([Block(args) for _ in range(args.n_layers)])
        self.norm = RMSNorm(args.dim, args.eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.register_buffer("freqs", angles(args.dim // args.n_heads, args.max_seq_len), persistent=False)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        turn = self.freqs[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turn)
        return self.output(self.norm(x))
