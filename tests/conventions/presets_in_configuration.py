"""A configuration has a table of presets, which another of its settings may name."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["n_embd"]
        assert width % config["n_head"] == 0
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        T, width = x.shape[1:]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / width**0.5
        return x + scores.masked_fill(future, float("-inf")).softmax(-1) @ self.value(x)


class GPT(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        kind = config["model_type"]
        if kind in config["models"]:
            for size in ("n_layer", "n_head", "n_embd"):
                config[size] = config["models"][kind][size]
        self.tokens = nn.Embedding(config["vocab_size"], config["n_embd"])
        self.positions = nn.Embedding(config["context_size"], config["n_embd"])
        self.layers = nn.ModuleList([Layer(config) for _ in range(config["n_layer"])])
        self.head = nn.Linear(config["n_embd"], config["vocab_size"])

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


CHOICES = {"model_type": "small"}
