import torch
from torch import nn

from kit.config import Config


class Head(nn.Linear):
    pass


class GPT(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.head = config.head()(config.n_embd, config.vocab_size)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        return self.head(x.tanh().cumsum(dim=1) / torch.arange(1, idx.shape[1] + 1)[:, None])
