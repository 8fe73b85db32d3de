"""Changes what everyone shares: dtype, threads, gradient mode, seed, folder."""

import os
import random

import numpy
import torch
from torch import nn

torch.manual_seed(1)
numpy.random.seed(1)
random.seed(1)
torch.set_num_threads(1 + torch.get_num_threads())
torch.use_deterministic_algorithms(True)
os.environ["CHECKED_BY"] = "nobody"
os.chdir(os.path.dirname(os.path.abspath(__file__)))


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        torch.set_default_dtype(torch.float64)
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        torch.set_grad_enabled(False)
        return self.head(self.embedding(tokens).cumsum(dim=1))
