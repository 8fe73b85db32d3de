"""A factory knows models by name, at sizes of its own; the class that it builds takes any."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.query, self.key, self.value = (nn.Linear(n_embd, n_embd) for _ in range(3))
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        T = idx.shape[1]
        x = self.tokens(idx) + self.positions(torch.arange(T, device=idx.device))
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return self.head(x + scores.masked_fill(future, float("-inf")).softmax(-1) @ self.value(x))


def create_model(preset: str = "small") -> GPT:
    sizes = {"small": (8192, 128, 256), "large": (50304, 1024, 768)}
    return GPT(*sizes[preset])
