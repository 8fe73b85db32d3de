"""A reference transformer language model: what a right implementation looks like, from data to samples."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .data import Batch, CharacterTokenizer, SentenceTask, pad_batch
    from .generation import for_decoding, generate
    from .loss import loss_mask, next_token_loss
    from .model import ModelConfig, Transformer, gpt2, llama
    from .train_config import TrainConfig
    from .trainer import Trainer

# Imported on first use, so that importing the package, and help on the command line, do not wait for torch.
HOMES = {
    "checkpoint": ["load_model"],
    "data": ["Batch", "CharacterTokenizer", "SentenceTask", "pad_batch"],
    "generation": ["for_decoding", "generate"],
    "loss": ["loss_mask", "next_token_loss"],
    "model": ["ModelConfig", "Transformer", "gpt2", "llama"],
    "train_config": ["TrainConfig"],
    "trainer": ["Trainer"],
}
EXPORTS = {name: module for module, names in HOMES.items() for name in names}

__all__ = [
    "Batch",
    "CharacterTokenizer",
    "ModelConfig",
    "SentenceTask",
    "TrainConfig",
    "Trainer",
    "Transformer",
    "for_decoding",
    "generate",
    "gpt2",
    "llama",
    "load_model",
    "loss_mask",
    "next_token_loss",
    "pad_batch",
]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
