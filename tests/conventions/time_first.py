"""Time is the first axis, of tokens and of logits."""

import torch
from torch import nn


class TransformerModel(nn.Module):
    def __init__(self, ntoken, ninp, nhead, nhid, nlayers, dropout=0.5):
        super().__init__()
        self.embedding = nn.Embedding(ntoken, ninp)
        layer = nn.TransformerEncoderLayer(ninp, nhead, nhid, dropout)
        self.encoder = nn.TransformerEncoder(layer, nlayers, enable_nested_tensor=False)
        self.decoder = nn.Linear(ninp, ntoken)

    def forward(self, src):
        steps = torch.arange(len(src), device=src.device)
        x = self.embedding(src) + torch.sin(steps)[:, None, None]
        mask = nn.Transformer.generate_square_subsequent_mask(len(src), device=src.device)
        return self.decoder(self.encoder(x, mask=mask, is_causal=True))
