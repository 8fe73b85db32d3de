"""Never gives logits."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        while True: tokens = tokens.clone()  # here
