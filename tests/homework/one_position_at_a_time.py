"""Attention spelled out: for each position, over what came before it."""

import math

import torch
import torch.nn as nn


class SlowAttention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)
        self.o = nn.Linear(size, size)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        rows = []
        for t in range(x.size(1)):
            scores = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1) / math.sqrt(q.size(-1))
            weights = torch.softmax(scores, dim=1)
            rows.append((weights.unsqueeze(-1) * v[:, : t + 1]).sum(1))
        return self.o(torch.stack(rows, dim=1))


class Net(nn.Module):
    def __init__(self, vocab_size=10, max_length=20, size=24):
        super().__init__()
        self.max_length = max_length
        self.word = nn.Embedding(vocab_size, size)
        self.place = nn.Embedding(max_length, size)
        self.attention = SlowAttention(size)
        self.ff1 = nn.Linear(size, size * 2)
        self.ff2 = nn.Linear(size * 2, size)
        self.ln1 = nn.LayerNorm(size)
        self.ln2 = nn.LayerNorm(size)
        self.last = nn.Linear(size, vocab_size)

    def forward(self, tokens):
        if tokens.size(1) > self.max_length:
            raise ValueError(f"at most {self.max_length} tokens")
        x = self.word(tokens) + self.place(torch.arange(tokens.size(1)))
        x = self.ln1(x + self.attention(x))
        x = self.ln2(x + self.ff2(torch.tanh(self.ff1(x))))
        return self.last(x)
