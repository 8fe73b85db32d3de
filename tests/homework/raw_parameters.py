"""Everything by hand: weights as nn.Parameter, einsum, a norm of its own."""

import torch
import torch.nn as nn


class Norm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return self.alpha * (x - mean) / (std + self.eps) + self.bias


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.h, self.d = heads, dim // heads
        self.wq = nn.Parameter(torch.empty(heads, dim, self.d))
        self.wk = nn.Parameter(torch.empty(heads, dim, self.d))
        self.wv = nn.Parameter(torch.empty(heads, dim, self.d))
        self.wo = nn.Parameter(torch.empty(heads, self.d, dim))
        for w in (self.wq, self.wk, self.wv, self.wo):
            nn.init.xavier_uniform_(w)

    def forward(self, x):
        n = x.shape[1]
        q = torch.einsum("bnc,hcd->bhnd", x, self.wq)
        k = torch.einsum("bnc,hcd->bhnd", x, self.wk)
        v = torch.einsum("bnc,hcd->bhnd", x, self.wv)
        a = torch.einsum("bhid,bhjd->bhij", q, k) / self.d**0.5
        future = torch.ones(n, n, device=x.device).triu(1).bool()
        a = a.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("bhij,bhjd,hdc->bic", a, v, self.wo)


class TinyTransformer(nn.Module):
    def __init__(self, num_tokens, dim=48, heads=3, max_len=40):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, dim) * 0.02)
        self.places = nn.Parameter(torch.randn(max_len, dim) * 0.02)
        self.norm1, self.norm2, self.norm3 = Norm(dim), Norm(dim), Norm(dim)
        self.attention = Attention(dim, heads)
        self.w1 = nn.Parameter(torch.randn(dim, 4 * dim) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(4 * dim))
        self.w2 = nn.Parameter(torch.randn(4 * dim, dim) * 0.02)
        self.b2 = nn.Parameter(torch.zeros(dim))

    def forward(self, ids):
        x = self.tokens[ids] + self.places[: ids.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + torch.relu(self.norm2(x) @ self.w1 + self.b1) @ self.w2 + self.b2
        return self.norm3(x) @ self.tokens.T


def masked_loss(logits, targets, mask):
    log_probs = torch.log_softmax(logits, dim=-1)
    picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return -(picked * mask).sum() / mask.sum()
