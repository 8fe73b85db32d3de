"""Libraries that training needs and the model does not are not installed."""

import hydra_of_nowhere
import lightning_of_nowhere
import torch
import wandb_of_nowhere
from torch import nn
from typing_of_nowhere import Annotated


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        T = x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        return x + self.feed_forward(x)


class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd, n_head, n_layer):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.head = nn.Linear(n_embd, vocab_size)

    def hidden(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, idx):
        return self.head(self.hidden(idx))


@hydra_of_nowhere.main(config_path="conf")
def train(config):
    wandb_of_nowhere.init(project="gpt")


class Trainer(lightning_of_nowhere.LightningModule):
    def __init__(self, model: Annotated[nn.Module]):
        super().__init__()
        self.model = model
