"""GPT-2 in functions over lists of parameters: no module is a layer, q, k and v multiply as x @ W."""

import torch
from torch import nn
from torch.nn import functional as F


class GPT(nn.Module):
    def __init__(self, vocab_size=29, block_size=12, n_layer=2, n_head=4, n_embd=24):
        super().__init__()
        self.n_head = n_head

        def matrix(*shape):
            return nn.ParameterList(nn.Parameter(torch.randn(shape) * 0.02) for _ in range(n_layer))

        def vector(value):
            return nn.ParameterList(nn.Parameter(torch.full((n_embd,), value)) for _ in range(n_layer))

        self.tokens = nn.Parameter(torch.randn(vocab_size, n_embd) * 0.02)
        self.places = nn.Parameter(torch.randn(block_size, n_embd) * 0.02)
        self.query, self.key, self.value, self.merge = (matrix(n_embd, n_embd) for _ in range(4))
        self.up, self.down = matrix(n_embd, 4 * n_embd), matrix(4 * n_embd, n_embd)
        self.gain1, self.gain2, self.shift1, self.shift2 = vector(1.0), vector(1.0), vector(0.0), vector(0.0)
        self.gain, self.shift = nn.Parameter(torch.ones(n_embd)), nn.Parameter(torch.zeros(n_embd))

    def attention(self, x, layer):
        B, T, C = x.shape
        q, k, v = (
            (x @ w[layer]).view(B, T, self.n_head, -1).transpose(1, 2) for w in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(B, T, C) @ self.merge[layer]

    def forward(self, tokens):
        x = self.tokens[tokens] + self.places[: tokens.shape[1]]
        width = x.shape[-1:]
        for layer in range(len(self.up)):
            x = x + self.attention(F.layer_norm(x, width, self.gain1[layer], self.shift1[layer]), layer)
            y = F.layer_norm(x, width, self.gain2[layer], self.shift2[layer])
            x = x + F.gelu(y @ self.up[layer], approximate="tanh") @ self.down[layer]
        return F.layer_norm(x, width, self.gain, self.shift) @ self.tokens.T
