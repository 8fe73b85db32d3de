"""A model without a batch axis: token ids [T] to logits [T, V], and the weights that it attended with."""

import torch
from torch import nn


class OneSequence(nn.Module):
    def __init__(self, num_tokens=6, d_model=16, max_len=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(num_tokens, d_model), nn.Embedding(max_len, d_model)
        self.query, self.key = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.head = nn.Linear(d_model, num_tokens)

    def forward(self, token_ids):
        T = len(token_ids)
        x = self.tokens(token_ids) + self.places(torch.arange(T, device=token_ids.device))
        scores = (self.query(x) @ self.key(x).T) / x.size(1) ** 0.5
        unseen = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return self.head(x + weights @ x), weights
