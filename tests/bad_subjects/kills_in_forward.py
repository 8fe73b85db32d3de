"""Ends the process at once when it is called."""

import os

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        os._exit(0)  # here
