"""No forward: encode, decode and project are called by hand."""

from torch import nn


class Transformer(nn.Module):
    def __init__(self, src_vocab_size, tgt_vocab_size, d_model, h):
        super().__init__()
        self.source, self.target = nn.Embedding(src_vocab_size, d_model), nn.Embedding(tgt_vocab_size, d_model)
        self.own = nn.MultiheadAttention(d_model, h, batch_first=True)
        self.cross = nn.MultiheadAttention(d_model, h, batch_first=True)
        self.projection = nn.Linear(d_model, tgt_vocab_size)

    def encode(self, src, src_mask):
        return self.source(src)

    def decode(self, encoder_output, src_mask, tgt, tgt_mask):
        x = self.target(tgt)
        unseen = (tgt_mask == 0)[:, 0].repeat_interleave(self.own.num_heads, dim=0)
        x = x + self.own(x, x, x, attn_mask=unseen, need_weights=False)[0]
        return x + self.cross(x, encoder_output, encoder_output, need_weights=False)[0]

    def project(self, x):
        return self.projection(x)
