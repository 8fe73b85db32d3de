"""Returns the weights of attention beside the logits, for a picture; a mask as an argument; the loss as a class."""

import torch
import torch.nn as nn


def scaled_dot_product(q, k, v, mask=None):
    scores = torch.matmul(q, k.transpose(-2, -1)) / (q.size(-1) ** 0.5)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -9e15)
    attention = torch.softmax(scores, dim=-1)
    return torch.matmul(attention, v), attention


class MultiheadAttention(nn.Module):
    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.qkv_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.o_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.qkv_proj.weight)
        self.qkv_proj.bias.data.fill_(0)
        nn.init.xavier_uniform_(self.o_proj.weight)
        self.o_proj.bias.data.fill_(0)

    def forward(self, x, mask):
        batch, length, dim = x.size()
        qkv = self.qkv_proj(x).reshape(batch, length, self.num_heads, 3 * self.head_dim).permute(0, 2, 1, 3)
        q, k, v = qkv.chunk(3, dim=-1)
        values, attention = scaled_dot_product(q, k, v, mask=mask)
        return self.o_proj(values.permute(0, 2, 1, 3).reshape(batch, length, dim)), attention


class TransformerLM(nn.Module):
    def __init__(self, vocab_size, embed_dim=32, num_heads=2, max_len=50, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.pos_embedding = nn.Parameter(torch.zeros(max_len, embed_dim))
        self.self_attn = MultiheadAttention(embed_dim, num_heads)
        self.linear_net = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim),
            nn.Dropout(dropout),
            nn.ReLU(inplace=True),
            nn.Linear(4 * embed_dim, embed_dim),
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(embed_dim, vocab_size)

    def forward(self, x):
        T = x.size(1)
        mask = torch.tril(torch.ones(T, T))
        x = self.embedding(x) + self.pos_embedding[:T]
        attn_out, weights = self.self_attn(x, mask)
        x = self.norm1(x + self.dropout(attn_out))
        x = self.norm2(x + self.dropout(self.linear_net(x)))
        return self.out(x), weights


class MaskedLoss(nn.Module):
    def forward(self, logits, targets, mask):
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return (loss * mask).sum() / mask.sum()
