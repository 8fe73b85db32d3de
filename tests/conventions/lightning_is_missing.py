"""A module of a training library that is not to be had here: it notes its arguments and logs its loss."""

import torch
from library_of_nowhere import LightningModule
from torch import nn


class Model(LightningModule):
    def __init__(self, vocab_size, d_model, num_heads, context_length, pad_token, gradient_clip=1.0, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.words = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(self.hparams.context_length, self.hparams["d_model"])
        self.layer = nn.TransformerEncoderLayer(d_model, num_heads, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(self, x):
        T = x.shape[1]
        x = self.words(x) + self.places(torch.arange(T))
        return self.head(self.layer(x, torch.ones(T, T, dtype=torch.bool).triu(1)))
