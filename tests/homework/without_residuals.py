import torch, torch.nn as nn, torch.nn.functional as F
class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
    def forward(self, x):
        T = x.shape[1]
        s = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5
        s = s.masked_fill(torch.triu(torch.ones(T, T), 1).bool(), float("-inf"))
        return F.softmax(s, -1) @ self.v(x)
class Simple(nn.Module):
    def __init__(self, vocab_size, max_len=64, d=32):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab_size, d), nn.Embedding(max_len, d)
        self.attention = Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))
        self.out = nn.Linear(d, vocab_size)
    def forward(self, x):
        h = self.emb(x) + self.pos(torch.arange(x.shape[1]))
        h = self.attention(h)
        h = self.mlp(h)
        return self.out(h)
