"""A folder at the root of the repository, no package."""

from dataclasses import dataclass


@dataclass
class Config:
    vocab_size: int = 100
    seq_len: int = 50
    d_model: int = 48
    n_heads: int = 6
    n_layers: int = 4
