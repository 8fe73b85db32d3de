"""Blocks and the model return dataclasses, the cache has another name; generate calls features and head apart."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    kept: Tensor
    output: Tensor


@dataclass(frozen=True)
class Answer:
    output: Tensor
    kv_caches: list[Tensor]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, before=None):
        every = x if before is None else torch.cat((before, x), dim=1)
        S, T = every.shape[1], x.shape[1]
        unseen = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        x = x + (self.query(x) @ every.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1) @ every
        return Step(every, x + self.down(self.up(x).relu()))


class Model(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd, n_layer):
        super().__init__()
        self.block_size = block_size
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd) for _ in range(n_layer))
        self.norm, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def features(self, idx, kv_caches=None):
        before = kv_caches[0].shape[1] if kv_caches else 0
        x = self.tokens(idx) + self.positions(torch.arange(before, before + idx.shape[1], device=idx.device))
        kept = []
        for i, block in enumerate(self.blocks):
            step = block(x, kv_caches[i] if kv_caches else None)
            x = step.output
            kept.append(step.kept)
        return self.norm(x), kept

    def forward(self, idx, kv_caches=None):
        x, kept = self.features(idx, kv_caches)
        return Answer(self.head(x), kept)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0):
        for _ in range(max_new_tokens):
            x, _ = self.features(idx[:, -self.block_size :])
            weights = (self.head(x)[:, -1] / temperature).softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(weights, 1)), dim=1)
        return idx
