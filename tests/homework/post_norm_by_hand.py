import math, torch, torch.nn as nn, torch.nn.functional as F


class SelfAttention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.d = d

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        s = q @ k.transpose(-2, -1) / math.sqrt(self.d)
        m = torch.tril(torch.ones(x.size(1), x.size(1)))
        s = s.masked_fill(m == 0, -1e9)
        return F.softmax(s, dim=-1) @ v


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.att = SelfAttention(d)
        self.n1 = nn.LayerNorm(d)
        self.n2 = nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = self.n1(x + self.att(x))
        return self.n2(x + self.ff(x))


class PositionalEncoding(nn.Module):
    def __init__(self, d, max_len=100):
        super().__init__()
        pe = torch.zeros(max_len, d)
        pos = torch.arange(0, max_len).unsqueeze(1).float()
        div = torch.exp(torch.arange(0, d, 2).float() * (-math.log(10000.0) / d))
        pe[:, 0::2] = torch.sin(pos * div)
        pe[:, 1::2] = torch.cos(pos * div)
        self.pe = pe.unsqueeze(0)

    def forward(self, x):
        return x + self.pe[:, : x.size(1)]


class TransformerLM(nn.Module):
    def __init__(self, vocab_size, d_model=64):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.pos = PositionalEncoding(d_model)
        self.block = Block(d_model)
        self.out = nn.Linear(d_model, vocab_size)

    def forward(self, x):
        return F.log_softmax(self.out(self.block(self.pos(self.embedding(x)))), dim=-1)


def compute_loss(logits, targets, mask=None):
    loss = F.nll_loss(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), reduction="none").view(targets.shape)
    if mask is not None:
        return (loss * mask).sum() / mask.sum()
    return loss.mean()
