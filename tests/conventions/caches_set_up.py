"""Caches are set up inside for a number of rows, kept while they are large enough, and told the places of tokens."""

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.query, self.head = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, vocab_size)
        self.max_batch_size = -1

    def setup_caches(self, max_batch_size, max_seq_length):
        if self.max_batch_size >= max_batch_size:
            return
        self.max_batch_size = max_batch_size
        shape = max_batch_size, max_seq_length, self.query.in_features
        self.register_buffer("past", torch.zeros(shape, dtype=self.head.weight.dtype))

    def forward(self, idx, input_pos=None):
        if input_pos is None:
            input_pos = torch.arange(idx.shape[1], device=idx.device)
        x = self.tokens(idx) + self.positions(input_pos)
        past = self.past
        past[:, input_pos] = x
        unseen = torch.arange(past.shape[1], device=x.device) > input_pos[:, None]
        weights = (self.query(x) @ past.transpose(1, 2)).masked_fill(unseen, -torch.inf).softmax(dim=-1)
        return self.head(x + weights @ past)
