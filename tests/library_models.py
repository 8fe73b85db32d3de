"""GPT-2 and Llama of the transformers library, loaded with our weights; test_parity.py compares with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch.overrides import TorchFunctionMode

from transformer_checks.transformer.model import ModelConfig, Transformer


class Promoted(TorchFunctionMode):
    """Replaces float32 by float64 in every call: the Llama of transformers computes norms and angles in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if v is torch.float32 else v for name, v in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


def amplified(config: ModelConfig, seed: int) -> Transformer:
    """A float64 model with large random weights: projections of gain 1.5, embeddings of deviation 1, noisy vectors."""
    model = Transformer(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 1:
                p += 0.3 * noise
            else:
                p.copy_(noise if id(p) in embeddings else 1.5 * noise / p.shape[1] ** 0.5)
    return model


def hf_gpt2(config: ModelConfig) -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
            n_embd=config.n_embd, n_inner=config.hidden, layer_norm_epsilon=config.norm_eps, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def hf_llama(config: ModelConfig) -> torch.nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, max_position_embeddings=config.block_size, hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, intermediate_size=config.hidden,
            num_key_value_heads=config.kv_heads, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tied,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base}, bos_token_id=None,
            eos_token_id=None,
        )
    )  # fmt: skip


def as_gpt2(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights, or gradients, with GPT2LMHeadModel's names and layout; its Conv1D stores matrices transposed."""
    names = {
        "embedding.": "transformer.wte.", "positions.table.": "transformer.wpe.", "head.": "lm_head.",
        "blocks.": "transformer.h.", "attention_norm.": "ln_1.", "attention.qkv.": "attn.c_attn.",
        "attention.output.": "attn.c_proj.", "feed_forward_norm.": "ln_2.", "feed_forward.input.": "mlp.c_fc.",
        "feed_forward.output.": "mlp.c_proj.",
    }  # fmt: skip
    theirs = renamed(ours, names, final_norm="transformer.ln_f.")
    return {name: value.T if ".c_" in name and value.dim() == 2 else value for name, value in theirs.items()}


def as_llama(ours: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our weights, or gradients, with LlamaForCausalLM's names and layout: separate queries, keys and values."""
    names = {
        "embedding.": "model.embed_tokens.", "head.": "lm_head.", "blocks.": "model.layers.",
        "attention_norm.": "input_layernorm.", "attention.qkv.": "self_attn.qkv.",
        "attention.output.": "self_attn.o_proj.", "feed_forward_norm.": "post_attention_layernorm.",
        "feed_forward.gate.": "mlp.gate_proj.", "feed_forward.input.": "mlp.up_proj.",
        "feed_forward.output.": "mlp.down_proj.",
    }  # fmt: skip
    theirs = renamed(ours, names, final_norm="model.norm.")
    H, G, D = config.n_head, config.kv_heads, config.head_width
    for name in [name for name in theirs if "qkv" in name]:
        for letter, rows in zip("qkv", theirs.pop(name).split((H * D, G * D, G * D)), strict=True):
            theirs[name.replace("qkv", f"{letter}_proj")] = rows
    return theirs


def renamed(ours: dict[str, torch.Tensor], names: dict[str, str], final_norm: str) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, value in ours.items():
        new = name.replace("norm.", final_norm) if name.startswith("norm.") else name
        for old, replacement in names.items():
            new = new.replace(old, replacement)
        theirs[new] = value
    return theirs


@dataclass
class Pair:
    """Our model and theirs with the same weights, and the mapping of names between them."""

    ours: Transformer
    theirs: torch.nn.Module

    @classmethod
    def draw(cls, config: ModelConfig, seed: int) -> Pair:
        with Promoted():
            theirs = (hf_gpt2 if config.positions == "learned" else hf_llama)(config).double().eval()
        pair = cls(amplified(config, seed), theirs)
        missing, unexpected = theirs.load_state_dict(pair.mapped(pair.ours.state_dict()), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        return pair

    def mapped(self, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        config = self.ours.config
        return as_gpt2(ours) if config.positions == "learned" else as_llama(ours, config)

    def to(self, dtype: torch.dtype) -> Pair:
        self.ours.to(dtype)
        self.theirs.to(dtype)
        return self

    def their_logits(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            return self.theirs(tokens).logits
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return self.theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
