"""A forward that gives the last position alone, and another method for training that gives them all."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, embed_size, num_heads, max_len):
        super().__init__()
        self.words = nn.Embedding(vocab_size, embed_size)
        self.places = nn.Embedding(max_len, embed_size)
        self.layer = nn.TransformerEncoderLayer(embed_size, num_heads, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(embed_size, vocab_size)

    def forward(self, src):
        return self.forward_training(src)[:, -1]

    def forward_training(self, src):
        T = src.shape[1]
        x = self.words(src) + self.places(torch.arange(T))
        return self.head(self.layer(x, torch.ones(T, T, dtype=torch.bool).triu(1)))
