"""Keeps its caches inside, in tensors of a fixed size, and is told the place of the first token."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, n, B, T):
        super().__init__()
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)
        self.cache_k, self.cache_v = torch.zeros(B, T, n), torch.zeros(B, T, n)

    def forward(self, x, start_pos):
        q, k, v = self.qkv(x).chunk(3, -1)
        B, T, _ = x.shape
        self.cache_k, self.cache_v = self.cache_k.to(x), self.cache_v.to(x)
        self.cache_k[:B, start_pos : start_pos + T] = k.detach()
        self.cache_v[:B, start_pos : start_pos + T] = v.detach()
        k = torch.cat((self.cache_k[:B, :start_pos], k), 1)
        v = torch.cat((self.cache_v[:B, :start_pos], v), 1)
        S = k.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        w = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(unseen, -torch.inf).softmax(-1)
        return x + self.out(w @ v)


class Llama(nn.Module):
    def __init__(self, vocab_size, max_seq_len, dim, n_layers, max_batch_size=32):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_seq_len, dim)
        self.layers = nn.ModuleList(Attention(dim, max_batch_size, max_seq_len) for _ in range(n_layers))
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens, start_pos):
        x = self.tokens(tokens) + self.positions(torch.arange(start_pos, start_pos + tokens.shape[1]))
        for layer in self.layers:
            x = layer(x, start_pos)
        return self.head(x)
