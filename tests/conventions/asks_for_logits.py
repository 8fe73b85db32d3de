"""Gives its logits to those who ask for them."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, targets=None, get_logits=False):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        logits = self.head(x.tanh().cumsum(dim=1) / torch.arange(1, idx.shape[1] + 1)[:, None])
        loss = None if targets is None else nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return {"logits": logits if get_logits else None, "loss": loss}
