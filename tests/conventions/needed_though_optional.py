"""Rotary positions are off by default, and the forward does not work without them."""

import torch
from torch import nn


class TransformerLM(nn.Module):
    def __init__(self, vocab_size, context_len, d_model, rope_theta=None):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.head = nn.Linear(d_model, vocab_size)
        self.d_model, self.rope_theta = d_model, rope_theta

    def forward(self, idx):
        frequencies = self.rope_theta ** -(torch.arange(self.d_model) / self.d_model)
        turned = self.tokens(idx) * torch.cos(torch.arange(idx.shape[1])[:, None] * frequencies)
        return self.head(turned.cumsum(dim=1))
