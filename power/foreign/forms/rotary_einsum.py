"""A Llama in einsum, heads in groups: sizes as keywords, a cache inside the model that start_pos addresses."""

import math

import torch
from torch import einsum, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        squares = x.float().pow(2).mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(squares + self.eps)).to(x.dtype) * self.gain


def rotary_table(positions, head_dim, base):
    rates = base ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None].float() * rates
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns neighbouring features of x [B, H, T, D] by the angles of their positions."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class GroupedAttention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, layer):
        super().__init__()
        self.n_head, self.n_kv, self.layer = n_heads, n_kv_heads, layer
        self.head_dim = dim // n_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.to_q = nn.Linear(dim, self.n_head * self.head_dim, bias=False)
        self.to_k = nn.Linear(dim, self.n_kv * self.head_dim, bias=False)
        self.to_v = nn.Linear(dim, self.n_kv * self.head_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.kept = None

    def forward(self, x, cos, sin, start_pos=None):
        B, T, C = x.shape
        q = self.to_q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.to_k(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.to_v(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if start_pos is not None:
            if start_pos > 0:
                past = [t[:, :, :start_pos] for t in self.kept]
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            self.kept = k, v
        S = k.size(2)
        q = q.view(B, self.n_kv, self.n_head // self.n_kv, T, self.head_dim)
        scores = einsum("bgrqd,bgkd->bgrqk", q, k) * self.scale
        hidden = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        y = einsum("bgrqk,bgkd->bgrqd", weights, v)
        y = y.flatten(1, 2)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y)


class GatedFeedForward(nn.Module):
    def __init__(self, dim, ffn_dim):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, ffn_dim, bias=False), nn.Linear(dim, ffn_dim, bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h)


class TransformerBlock(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads, ffn_dim, layer):
        super().__init__()
        self.attn, self.mlp = GroupedAttention(dim, n_heads, n_kv_heads, layer), GatedFeedForward(dim, ffn_dim)
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)

    def forward(self, x, cos, sin, start_pos=None):
        x = x + self.attn(self.norm1(x), cos, sin, start_pos)
        x = x + self.mlp(self.norm2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, vocab_size=65, dim=48, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=96, max_seq_len=64,
                 rope_theta=10000.0):  # fmt: skip
        super().__init__()
        self.max_seq_len, self.rope_theta, self.head_dim = max_seq_len, rope_theta, dim // n_heads
        self.wte = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, n_heads, n_kv_heads, ffn_dim, layer) for layer in range(n_layers)
        )
        self.norm = RMSNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, mean=0.0, std=0.02)

    def forward(self, tokens, start_pos=None):
        """Logits [B, T, V]; with start_pos, the keys and values of earlier calls up to it are read, and kept."""
        T = tokens.size(1)
        before = start_pos or 0
        S = before + T
        if S > self.max_seq_len:
            raise ValueError(f"{S} tokens are more than max_seq_len={self.max_seq_len}")
        positions = torch.arange(before, S, device=tokens.device)
        cos, sin = rotary_table(positions, self.head_dim, self.rope_theta)
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, start_pos)
        logits = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, temperature=1.0, top_k=None, eos_id=None):
        was_training = self.training
        self.eval()
        idx, start, window = prompt, 0, prompt
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if start == 0 or idx.size(1) > self.max_seq_len:
                start, window = 0, idx[:, -self.max_seq_len :]
            logits = self(window, start)[:, -1]
            start = start + window.size(1)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                probs = logits.softmax(dim=-1)
                token = torch.multinomial(probs, num_samples=1)
            if eos_id is not None:
                token = token.masked_fill(done[:, None], eos_id)
                done = done | (token[:, 0] == eos_id)
            idx = torch.cat((idx, token), dim=1)
            window = token
            if done.all():
                break
        for block in self.blocks:
            block.attn.kept = None
        self.train(was_training)
        return idx
