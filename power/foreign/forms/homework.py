"""A homework: a GPT-2 with its heads in a list, the loss with its mask, generate and train_step as plain functions."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.eps) * self.gain + self.bias


class Head(nn.Module):
    def __init__(self, d_model, n_head, dropout):
        super().__init__()
        self.n_head, self.head_dim = n_head, d_model // n_head
        self.scale = 1 / math.sqrt(self.head_dim)
        self.query = nn.Linear(d_model, self.head_dim)
        self.key = nn.Linear(d_model, self.head_dim)
        self.value = nn.Linear(d_model, self.head_dim)
        self.attn_drop = nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = q @ k.transpose(-2, -1) * self.scale
        hidden = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(dim=-1)
        weights = self.attn_drop(weights)
        y = weights @ v
        return y


class MultiHead(nn.Module):
    def __init__(self, d_model, n_head, dropout):
        super().__init__()
        self.heads = nn.ModuleList([Head(d_model, n_head, dropout) for _ in range(n_head)])
        self.proj = nn.Linear(d_model, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        y = torch.cat([head(x) for head in self.heads], dim=-1)
        return self.drop(self.proj(y))


class FeedForward(nn.Module):
    def __init__(self, d_model, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = F.gelu(self.up(x), approximate="tanh")
        return self.drop(self.down(h))


class Block(nn.Module):
    def __init__(self, d_model, n_head, dropout):
        super().__init__()
        self.attn, self.mlp = MultiHead(d_model, n_head, dropout), FeedForward(d_model, dropout)
        self.norm1, self.norm2 = Norm(d_model), Norm(d_model)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class LanguageModel(nn.Module):
    def __init__(self, vocab_size, d_model, n_head, n_layer, context_length, dropout=0.0):
        super().__init__()
        self.context_length, self.n_layer = context_length, n_layer
        self.wte, self.wpe = nn.Embedding(vocab_size, d_model), nn.Embedding(context_length, d_model)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(d_model, n_head, dropout) for _ in range(n_layer)])
        self.norm = Norm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))
            elif p.dim() > 1:
                nn.init.normal_(p, mean=0.0, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x):
        T = x.size(1)
        if T > self.context_length:
            raise ValueError(f"the text has {T} tokens, the context length is {self.context_length}")
        positions = torch.arange(T, device=x.device)
        x = self.wte(x) + self.wpe(positions)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits


def compute_loss(logits, targets, mask=None):
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    if mask is None:
        return losses.mean()
    return (losses * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    was_training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        window = idx[:, -model.context_length :]
        logits = model(window)[:, -1]
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            probs = logits.softmax(dim=-1)
            token = torch.multinomial(probs, num_samples=1)
        idx = torch.cat((idx, token), dim=1)
    model.train(was_training)
    return idx


def train_step(model, optimizer, batch, scheduler=None, max_norm=None):
    model.train()
    tokens, targets = batch
    optimizer.zero_grad()
    loss = compute_loss(model(tokens), targets)
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    return loss.item()
