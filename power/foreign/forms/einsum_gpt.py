"""A GPT-2 in einsum: sizes as keywords, a padding mask with a default, and loss, generate and train_step as functions."""

import math

import torch
from torch import einsum, nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.eps) * self.gain + self.bias


class Attention(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.n_head, self.head_dim = heads, dim // heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop, self.drop = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = (to(x).view(B, T, self.n_head, self.head_dim) for to in (self.to_q, self.to_k, self.to_v))
        scores = einsum("bqhd,bkhd->bhqk", q, k) * self.scale
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        if mask is not None:
            own = torch.eye(T, dtype=torch.bool, device=x.device)
            hidden = hidden | (~mask[:, None, None, :].bool() & ~own)
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        weights = self.attn_drop(weights)
        y = einsum("bhqk,bkhd->bqhd", weights, v)
        y = y.reshape(B, T, C)
        return self.drop(self.proj(y))


class FeedForward(nn.Module):
    def __init__(self, dim, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = F.gelu(self.up(x), approximate="tanh")
        return self.drop(self.down(h))


class Layer(nn.Module):
    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads, dropout), FeedForward(dim, dropout)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)
        x = x + self.mlp(self.norm2(x))
        return x


class DecoderLM(nn.Module):
    def __init__(self, vocab_size=65, max_len=64, dim=48, depth=3, heads=4, dropout=0.0):
        super().__init__()
        self.max_len = max_len
        self.wte, self.wpe = nn.Embedding(vocab_size, dim), nn.Embedding(max_len, dim)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Layer(dim, heads, dropout) for _ in range(depth))
        self.norm = LayerNorm(dim)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * depth))
            elif p.dim() > 1:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, mask=None):
        T = tokens.size(1)
        if T > self.max_len:
            raise ValueError(f"{T} tokens do not fit into {self.max_len} positions")
        positions = torch.arange(T, device=tokens.device)
        if mask is not None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        x = self.wte(tokens) + self.wpe(positions)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, mask)
        return F.linear(self.norm(x), self.wte.weight)


def masked_loss(logits, targets, mask=None):
    """Mean cross entropy in nats of the targets [B, T] where the mask is true."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos_id=None):
    was_training = model.training
    model.eval()
    idx = prompt
    done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        window = idx[:, -model.max_len :]
        logits = model(window)[:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
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
        if done.all():
            break
    model.train(was_training)
    return idx


def train_step(model, optimizer, batch, scheduler=None, max_norm=None):
    model.train()
    tokens, targets = batch
    optimizer.zero_grad()
    loss = masked_loss(model(tokens), targets)
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss.item()
