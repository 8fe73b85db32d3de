"""Other implementations of the same model at the same sizes, trained and decoded as their authors do."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_checks.checks.subject import Sizes
from transformer_checks.transformer.generation import for_decoding, generate
from transformer_checks.transformer.loss import next_token_loss
from transformer_checks.transformer.model import Transformer, gpt2
from transformer_checks.transformer.optimizer import build_optimizer
from transformer_checks.transformer.trainer import TrainConfig


@dataclass
class Peer:
    """A model with its loss(tokens, targets), its optimizer, and its greedy decode(prompt, n)."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    decode: Callable[[Tensor, int], Tensor]

    def step(self, tokens: Tensor, targets: Tensor, *, bfloat16: bool = False) -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self.loss(tokens, targets)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ours(sizes: Sizes, **parts: Any) -> Peer:
    """`parts` are further fields of the model's config."""
    model = Transformer(gpt2(**vars(sizes), **parts))
    ready = functools.cache(lambda: for_decoding(model))  # made at the first call, as when a model is loaded
    optimizer = build_optimizer(model, TrainConfig(optimizer="adamw", learning_rate=1e-4))
    return Peer(
        model.train(),
        lambda tokens, targets: next_token_loss(model(tokens), targets),
        optimizer,
        lambda prompt, n: generate(ready(), prompt, n),
    )


def ours_without_cache(sizes: Sizes) -> Peer:
    peer = ours(sizes)
    peer.decode = lambda prompt, n: generate(peer.model, prompt, n, use_cache=False)
    return peer


def nanogpt(folder: str | Path, sizes: Sizes) -> Peer:
    """From a folder with nanoGPT's model.py. Raises FileNotFoundError if it has none."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise FileNotFoundError(f"no model.py in {folder}: --nanogpt must be a clone of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        spec.loader.exec_module(module)
        model = module.GPT(module.GPTConfig(**vars(sizes), bias=True))
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    return Peer(
        model, lambda tokens, targets: model(tokens, targets)[1], optimizer, lambda p, n: model.generate(p, n, top_k=1)
    )


def hf_gpt2(sizes: Sizes) -> Peer:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=sizes.vocab_size, n_positions=sizes.block_size, n_layer=sizes.n_layer, n_head=sizes.n_head,
        n_embd=sizes.n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()

    def decode(prompt: Tensor, n: int) -> Tensor:
        attended = torch.ones_like(prompt)
        model.eval()
        how = dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
        tokens: Tensor = model.generate(prompt, attention_mask=attended, **how)
        return tokens

    return Peer(
        model,
        lambda tokens, targets: cross_entropy(model(tokens, use_cache=False).logits, targets),
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        decode,
    )


def x_transformers(sizes: Sizes) -> Peer:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(
        dim=sizes.n_embd, depth=sizes.n_layer, heads=sizes.n_head, attn_dim_head=sizes.n_embd // sizes.n_head,
        attn_flash=True,
    )  # fmt: skip
    model = TransformerWrapper(
        num_tokens=sizes.vocab_size, max_seq_len=sizes.block_size, attn_layers=layers, tie_embedding=True
    )
    wrapper = AutoregressiveWrapper(model)
    return Peer(
        model,
        lambda tokens, targets: cross_entropy(model(tokens), targets),
        torch.optim.AdamW(model.parameters(), lr=1e-4),
        lambda prompt, n: wrapper.generate(prompt, n, temperature=0.0, cache_kv=True),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
