"""The vocabulary comes from a tokenizer, which its generate asks for the text's ids."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feed_forward(x)


class GPT(nn.Module):
    def __init__(self, tokenizer, block_size, n_embd, n_head, n_layer):
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens = nn.Embedding(tokenizer.vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, tokenizer.vocab_size)

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))

    @torch.no_grad()
    def generate(self, prompt: str, max_gen_len: int, temperature: float = 1.0) -> str:
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        for _ in range(max_gen_len):
            logits = self(ids)[:, -1] / temperature
            ids = torch.cat((ids, logits.softmax(-1).multinomial(1)), dim=1)
        return self.tokenizer.decode(ids[0].tolist())
