"""Llama with complex rotations, grouped heads, w1 w2 w3."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    dim: int = 48
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 30
    max_seq_len: int = 16
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rotate(x, turns):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.D, self.repeats = args.dim // args.n_heads, args.n_heads // args.n_kv_heads
        self.wq = nn.Linear(args.dim, args.n_heads * self.D, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * self.D, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * self.D, bias=False)
        self.wo = nn.Linear(args.n_heads * self.D, args.dim, bias=False)

    def forward(self, x, turns):
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, self.D) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, turns), rotate(k, turns)
        k, v = (y.repeat_interleave(self.repeats, dim=2) for y in (k, v))
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / self.D**0.5
        scores = scores + torch.full((T, T), float("-inf")).triu(1)
        y = F.softmax(scores.float(), dim=-1).type_as(q) @ v.transpose(1, 2)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = 8 * dim // 3 + 4
        self.w1, self.w2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.feed_forward = Attention(args), FeedForward(args.dim)
        self.attention_norm, self.ffn_norm = RMSNorm(args.dim, args.norm_eps), RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, turns):
        h = x + self.attention(self.attention_norm(x), turns)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)

    def turns(self, T):
        D = self.args.dim // self.args.n_heads
        rates = 1.0 / self.args.rope_theta ** (torch.arange(0, D, 2).float() / D)
        angles = torch.outer(torch.arange(T), rates)
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, tokens):
        h, turns = self.tok_embeddings(tokens), self.turns(tokens.shape[1])
        for layer in self.layers:
            h = layer(h, turns)
        return self.output(self.norm(h))
