from dataclasses import dataclass

import kit


@dataclass
class Config:
    vocab_size: int = 50_000
    block_size: int = 1024
    n_embd: int = 256
    head_class: str = "Head"

    def head(self):
        return getattr(kit.model, self.head_class)
