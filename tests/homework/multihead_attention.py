"""nn.MultiheadAttention before the norm, a boolean mask, a tied head, a dictionary for the sizes."""

import torch
import torch.nn as nn

config = {"vocab_size": 12, "context": 24, "dim": 32, "heads": 4, "layers": 1, "drop": 0.1}


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm_a = nn.LayerNorm(cfg["dim"])
        self.mha = nn.MultiheadAttention(cfg["dim"], cfg["heads"], dropout=cfg["drop"], batch_first=True)
        self.norm_f = nn.LayerNorm(cfg["dim"])
        self.ffn = nn.Sequential(
            nn.Linear(cfg["dim"], 4 * cfg["dim"]),
            nn.GELU(),
            nn.Linear(4 * cfg["dim"], cfg["dim"]),
            nn.Dropout(cfg["drop"]),
        )

    def forward(self, x, blocked):
        h = self.norm_a(x)
        h, _ = self.mha(h, h, h, attn_mask=blocked, need_weights=False)
        x = x + h
        return x + self.ffn(self.norm_f(x))


class LanguageModel(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embed = nn.Embedding(cfg["vocab_size"], cfg["dim"])
        self.position = nn.Embedding(cfg["context"], cfg["dim"])
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["layers"]))
        self.norm = nn.LayerNorm(cfg["dim"])
        self.head = nn.Linear(cfg["dim"], cfg["vocab_size"], bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.embed(tokens) + self.position(torch.arange(T, device=tokens.device))
        blocked = torch.triu(torch.ones(T, T, dtype=torch.bool, device=tokens.device), diagonal=1)
        for layer in self.layers:
            x = layer(x, blocked)
        return self.head(self.norm(x))
