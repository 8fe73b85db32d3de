"""GPT-2 in einsum: W_Q [head, model, feature], a layer norm of its own, matrices without nn.Linear."""

import torch
from torch import nn


class Norm(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.b, self.w = nn.Parameter(torch.zeros(d_model)), nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w + self.b


class Attention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        d_head = d_model // n_heads
        for letter in "QKV":
            setattr(self, f"W_{letter}", nn.Parameter(torch.randn(n_heads, d_model, d_head) * 0.02))
            setattr(self, f"b_{letter}", nn.Parameter(torch.zeros(n_heads, d_head)))
        self.W_O = nn.Parameter(torch.randn(n_heads, d_head, d_model) * 0.02)
        self.b_O = nn.Parameter(torch.zeros(d_model))

    def forward(self, x):
        q = torch.einsum("bpm,nmh->bpnh", x, self.W_Q) + self.b_Q
        k = torch.einsum("bpm,nmh->bpnh", x, self.W_K) + self.b_K
        v = torch.einsum("bpm,nmh->bpnh", x, self.W_V) + self.b_V
        scores = torch.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.triu(torch.ones_like(scores), diagonal=1).bool()
        z = torch.einsum("bnqk,bknh->bqnh", scores.masked_fill(hidden, -1e30).softmax(-1), v)
        return torch.einsum("bqnh,nhm->bqm", z, self.W_O) + self.b_O


class MLP(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.W_in, self.b_in = (
            nn.Parameter(torch.randn(d_model, 4 * d_model) * 0.02),
            nn.Parameter(torch.zeros(4 * d_model)),
        )
        self.W_out, self.b_out = (
            nn.Parameter(torch.randn(4 * d_model, d_model) * 0.02),
            nn.Parameter(torch.zeros(d_model)),
        )

    def forward(self, x):
        hidden = torch.einsum("bpm,mh->bph", x, self.W_in) + self.b_in
        return torch.einsum("bph,hm->bpm", nn.functional.gelu(hidden, approximate="tanh"), self.W_out) + self.b_out


class Block(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = (
            Norm(d_model),
            Attention(d_model, n_heads),
            Norm(d_model),
            MLP(d_model),
        )

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    def __init__(self, d_vocab, n_ctx, n_layers, n_heads, d_model):
        super().__init__()
        self.W_E, self.W_pos = nn.Parameter(torch.randn(d_vocab, d_model)), nn.Parameter(torch.randn(n_ctx, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.ln_final = Norm(d_model)
        self.W_U, self.b_U = nn.Parameter(torch.randn(d_model, d_vocab)), nn.Parameter(torch.zeros(d_vocab))

    def forward(self, tokens):
        x = self.W_E[tokens] + self.W_pos[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return torch.einsum("bpm,mv->bpv", self.ln_final(x), self.W_U) + self.b_U
