"""Sizes whose names are in nobody's list, but made of its words."""

import torch
from torch import nn


class Decoder(nn.Module):
    def __init__(self, my_vocab_size, max_decoding_length, dim_vector, number_of_my_heads, num_decoder_stack_layers):
        super().__init__()
        self.tokens = nn.Embedding(my_vocab_size, dim_vector)
        self.positions = nn.Embedding(max_decoding_length, dim_vector)
        block = nn.TransformerEncoderLayer(dim_vector, number_of_my_heads, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, num_decoder_stack_layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim_vector, my_vocab_size)
        for weights in self.blocks.parameters():  # which nn.TransformerEncoder copies from layer to layer
            if weights.dim() > 1:
                nn.init.xavier_uniform_(weights)

    def forward(self, ids):
        T = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(T, device=ids.device))
        return self.head(self.blocks(x, torch.ones(T, T, dtype=torch.bool, device=ids.device).triu(1)))
