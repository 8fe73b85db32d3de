"""Has parts, and no forward to run them."""

from torch import nn


class Transformer(nn.Module):
    def __init__(self, vocab_size, n_embd):  # here
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)
