"""Each part takes what it needs from the keywords and passes the others on; some that it passes on have no default."""

import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, width, tiny, **others):
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.ones(width)), tiny

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny)


class Mixer(nn.Module):
    def __init__(self, width, heads, **others):
        super().__init__()
        self.heads, self.norm = heads, Norm(width, **others)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).reshape(B, T, C))


class Feed(nn.Module):
    def __init__(self, width, dropout=0.5):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.drop(self.down(self.up(x).relu()))


class Model(nn.Module):
    def __init__(self, vocab_size, block_size, **others):
        super().__init__()
        width = others["width"]
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.mixer, self.feed = Mixer(**others), Feed(width)
        self.norm, self.head = Norm(**others), nn.Linear(width, vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        return self.head(self.norm(self.feed(self.mixer(x))))


if __name__ == "__main__":
    print(Model(30, 20, width=16, heads=2, tiny=1e-6))
