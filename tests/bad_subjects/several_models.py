"""Two models of equal standing."""

from torch import nn


class Small(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size))

    def forward(self, tokens):
        return self.layers(tokens)


class Large(nn.Module):
    def __init__(self, vocab_size, d_model):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size))

    def forward(self, tokens):
        return self.layers(tokens)
