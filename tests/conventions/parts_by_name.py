"""Is handed its encoder and its decoder; their own names for the vocabularies and the width."""

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, input_dim, hid_dim, dropout, device, max_length=100):
        super().__init__()
        self.tokens = nn.Embedding(input_dim, hid_dim)
        self.positions = nn.Embedding(max_length, hid_dim)

    def forward(self, src):
        return self.tokens(src) + self.positions(torch.arange(src.shape[1]))


class Decoder(nn.Module):
    def __init__(self, output_dim, hid_dim, n_heads, pf_dim, dropout, device, max_length=100):
        super().__init__()
        self.tokens = nn.Embedding(output_dim, hid_dim)
        self.positions = nn.Embedding(max_length, hid_dim)
        self.block = nn.TransformerDecoderLayer(hid_dim, n_heads, pf_dim, dropout, batch_first=True)
        self.fc_out = nn.Linear(hid_dim, output_dim)

    def forward(self, trg, memory):
        T = trg.shape[1]
        x = self.tokens(trg) + self.positions(torch.arange(T))
        return self.fc_out(self.block(x, memory, torch.ones(T, T, dtype=torch.bool).triu(1)))


class Seq2Seq(nn.Module):
    def __init__(self, encoder, decoder, src_pad_idx, trg_pad_idx, device):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.src_pad_idx, self.trg_pad_idx, self.device = src_pad_idx, trg_pad_idx, device

    def forward(self, src, trg):
        return self.decoder(trg, self.encoder(src))
