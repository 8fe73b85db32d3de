"""A class in NumPy that takes arrays."""

import numpy as np


class Model:
    def __init__(self, vocab_size, n_embd, block_size):
        rng = np.random.default_rng(0)
        self.table = rng.normal(size=(vocab_size, n_embd))
        self.positions = rng.normal(size=(block_size, n_embd))

    def __call__(self, tokens):
        assert isinstance(tokens, np.ndarray)
        x = self.table[tokens] + self.positions[: tokens.shape[1]]
        x = np.cumsum(x, axis=1) / np.arange(1, tokens.shape[1] + 1)[:, None]
        return x @ self.table.T
