"""An encoder and a decoder; masks of both must be given."""

from torch import nn


class Transformer(nn.Module):
    def __init__(self, src_vocab, tgt_vocab, d_model, n_heads, num_layers):
        super().__init__()
        self.source, self.target = nn.Embedding(src_vocab, d_model), nn.Embedding(tgt_vocab, d_model)
        self.encoder = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(d_model, n_heads, batch_first=True) for _ in range(num_layers)
        )
        self.cross = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.head = nn.Linear(d_model, tgt_vocab)

    def forward(self, src, tgt, src_mask, tgt_mask):
        assert src_mask.shape == (len(src), 1, 1, src.shape[1])
        memory, x = self.source(src), self.target(tgt)
        memory = memory + self.encoder(memory, memory, memory, need_weights=False)[0]
        for layer in self.layers:
            unseen = ~tgt_mask[:, 0].repeat_interleave(layer.num_heads, dim=0)
            x = x + layer(x, x, x, attn_mask=unseen, need_weights=False)[0]
        return self.head(x + self.cross(x, memory, memory, need_weights=False)[0])
