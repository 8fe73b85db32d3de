"""Only one token is read at a time; earlier keys are kept inside."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, vocab_size, dim, max_seq_len):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.query, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocab_size)
        self.seen = [None] * max_seq_len

    def forward(self, tokens, start_pos):
        assert tokens.shape[1] == 1, "one token at a time"
        x = self.tokens(tokens)
        self.seen[start_pos] = x
        past = torch.cat(self.seen[: start_pos + 1], dim=1)
        weights = (self.query(x) @ past.transpose(1, 2)).softmax(dim=-1)
        return self.head(x + self.value(weights @ past))
