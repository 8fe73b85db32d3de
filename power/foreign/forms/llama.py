"""A Llama in one file: a dataclass for its sizes, grouped heads, a cache object of its own that its generate fills."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class ModelArgs:
    dim: int = 48
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    vocab_size: int = 65
    hidden_dim: int = 96
    max_seq_len: int = 64
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0


class KVCache:
    """Keys and values [B, H, S, D] of each layer; it grows as it is read into."""

    def __init__(self, n_layers):
        self.keys, self.values = [None] * n_layers, [None] * n_layers

    def __len__(self):
        return 0 if self.keys[-1] is None else self.keys[-1].size(2)

    def update(self, layer, k, v):
        if self.keys[layer] is not None:
            k, v = torch.cat((self.keys[layer], k), dim=2), torch.cat((self.values[layer], v), dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        squares = x.float().pow(2).mean(-1, keepdim=True)
        return (x.float() * torch.rsqrt(squares + self.eps)).to(x.dtype) * self.weight


def rotary_table(positions, head_dim, base):
    rates = base ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[..., None].float() * rates
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.n_head, self.n_kv, self.layer = args.n_heads, args.n_kv_heads, layer
        self.head_dim = args.dim // args.n_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.wq = nn.Linear(args.dim, self.n_head * self.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, self.n_kv * self.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, self.n_kv * self.head_dim, bias=False)
        self.proj = nn.Linear(args.dim, args.dim, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q = self.wq(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        S = k.size(2)
        k, v = (t.repeat_interleave(self.n_head // self.n_kv, dim=1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * self.scale
        hidden = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        y = weights @ v
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y)


class SwiGLU(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.gate = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.up = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.down = nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h)


class Block(nn.Module):
    def __init__(self, args, layer):
        super().__init__()
        self.attn, self.mlp = Attention(args, layer), SwiGLU(args)
        self.norm1, self.norm2 = RMSNorm(args.dim, args.norm_eps), RMSNorm(args.dim, args.norm_eps)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(self.norm1(x), cos, sin, cache)
        x = x + self.mlp(self.norm2(x))
        return x


class Llama(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.wte = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = nn.ModuleList(Block(args, layer) for layer in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = nn.Linear(args.dim, args.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, mean=0.0, std=0.02)

    def new_cache(self):
        return KVCache(self.args.n_layers)

    def forward(self, tokens, cache=None):
        T = tokens.size(1)
        before = len(cache) if cache is not None else 0
        S = before + T
        if S > self.args.max_seq_len:
            raise ValueError(f"{S} tokens are more than max_seq_len={self.args.max_seq_len}")
        positions = torch.arange(before, S, device=tokens.device)
        cos, sin = rotary_table(positions, self.args.dim // self.args.n_heads, self.args.rope_theta)
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        logits = self.head(self.norm(x))
        return logits


def loss_fn(logits, targets, mask=None):
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def generate(model, prompt_tokens, max_gen_len, temperature=1.0, top_p=None, eos_id=None):
    was_training = model.training
    model.eval()
    idx, window, cache = prompt_tokens, prompt_tokens, None
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for _ in range(max_gen_len):
        if cache is None or idx.size(1) > model.args.max_seq_len:
            cache, window = model.new_cache(), idx[:, -model.args.max_seq_len :]
        logits = model(window, cache)[:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_p is not None:
                ordered, order = logits.sort(dim=-1, descending=True)
                sorted_probs = ordered.softmax(dim=-1)
                late = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p
                logits = logits.masked_fill(late.scatter(-1, order, late), float("-inf"))
            probs = logits.softmax(dim=-1)
            token = torch.multinomial(probs, num_samples=1)
        if eos_id is not None:
            token = token.masked_fill(done[:, None], eos_id)
            done = done | (token[:, 0] == eos_id)
        idx = torch.cat((idx, token), dim=1)
        window = token
        if done.all():
            break
    model.train(was_training)
    return idx


def train_step(model, optimizer, batch, scheduler=None, max_norm=None):
    model.train()
    tokens, targets = batch
    optimizer.zero_grad()
    loss = loss_fn(model(tokens), targets)
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss.item()
