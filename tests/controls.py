"""Correct models that must not fail any check: models of public libraries at tiny sizes.

`CONTROLS` maps a name to a function that makes a Subject; variants*.py add variants of the reference to it. `FAULTY`
holds library models that have a real bug, each with the check that finds it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from transformer_checks.checks.subject import Subject

CONTROLS: dict[str, Callable[..., Subject]] = {}
FAULTY: dict[str, tuple[str, Callable[..., Subject]]] = {}


class Called(Subject):
    """A subject whose logits are computed by `call(model, tokens, mask)`, for models with an interface of their own."""

    def __init__(self, name: str, build: Callable[..., nn.Module], call: Callable, *, mask: bool, **declared: Any):
        super().__init__(name, SimpleNamespace(build_model=build), **declared)
        self.call, self.masked = call, mask

    def logits(self, model: nn.Module, tokens: Tensor, mask: Tensor | None = None, cache: Any = None, **more: Any):
        return self.call(model, tokens, mask)

    def new_cache(self, model: nn.Module, batch_size: int) -> None:
        return None

    @property
    def takes_mask(self) -> bool:
        return self.masked


# -- the transformers library; families and options are named as there


def library(
    name: str,
    family: str,
    *,
    mask: bool = True,
    head: str = "ForCausalLM",
    config: str | None = None,
    attention: str | None = None,
    **fixed: Any,
) -> None:
    """Adds one of its causal models; `fixed` are its other configuration fields, or functions of the sizes."""

    def build(vocab_size, block_size, n_layer, n_head, n_embd, dropout):
        import transformers

        sizes = SimpleNamespace(
            V=vocab_size, T=block_size, L=n_layer, H=n_head, C=n_embd, D=n_embd // n_head, p=dropout
        )
        config_class = getattr(transformers, config or family + "Config")
        given = {
            "vocab_size": vocab_size, "max_position_embeddings": block_size, "n_positions": block_size,
            "num_hidden_layers": n_layer, "num_layers": n_layer, "n_layer": n_layer, "n_layers": n_layer,
            "num_attention_heads": n_head, "n_head": n_head, "n_heads": n_head, "num_heads": n_head,
            "hidden_size": n_embd, "n_embd": n_embd, "d_model": n_embd, "intermediate_size": 4 * n_embd,
            "max_seq_len": block_size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
            "attention_dropout": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout,
            "hidden_dropout": dropout, "resid_dropout": dropout, "embed_dropout": dropout, "dropout": dropout,
            "attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout, "layerdrop": 0.0,
            "activation_dropout": dropout, "emb_pdrop": dropout, "ffn_dim": 4 * n_embd, "attention_heads": n_head,
        }  # fmt: skip
        known = fields_of(config_class)
        given = {key: value for key, value in given.items() if key in known}
        given.update({key: value(sizes) if callable(value) else value for key, value in fixed.items()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = config_class(**given)
            if attention is not None:
                chosen._attn_implementation = attention
            return getattr(transformers, family + head)(chosen)

    def call(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        more: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters_of(type(model)) else {}
        if mask is not None:
            more["attention_mask"] = mask.long()
            if "position_ids" in parameters_of(type(model)):
                more["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return model(tokens, **more).logits

    CONTROLS[name] = functools.partial(Called, name, build, call, mask=mask)


@functools.cache
def parameters_of(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


@functools.cache
def fields_of(config_class: type) -> frozenset[str]:
    names = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "attribute_map", {}))
    return frozenset(names | set(getattr(config_class, "__annotations__", {})) | set(vars(config_class)))


def half(sizes: Any) -> int:
    """The number of key-value heads for grouped attention: half the number of heads, at least one."""
    return max(sizes.H // 2, 1)


def global_then_local(sizes: Any) -> list[Any]:
    return [[["global"], 1], *([[["local"], sizes.L - 1]] if sizes.L > 1 else [])]


def every_other_sliding(sizes: Any) -> list[str]:
    return ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(sizes.L)]


library("gpt2", "GPT2", head="LMHeadModel")
library("gpt-neo", "GPTNeo", attention_types=global_then_local, window_size=5)
library("gpt-neox", "GPTNeoX")
library("gpt-neox-sequential", "GPTNeoX", use_parallel_residual=False)
library("gpt-j", "GPTJ", rotary_dim=4)
library("codegen", "CodeGen", rotary_dim=4)
library("gpt-bigcode", "GPTBigCode")
library("llama", "Llama")
library("llama-grouped-tied-biased", "Llama", num_key_value_heads=half, tie_word_embeddings=True, attention_bias=True,
        mlp_bias=True)  # fmt: skip
library("mistral-sliding", "Mistral", num_key_value_heads=half, sliding_window=5, head_dim=lambda s: s.D)
library("mixtral", "Mixtral", num_key_value_heads=half, num_local_experts=4, num_experts_per_tok=2)
library("qwen2", "Qwen2", num_key_value_heads=half)
library("qwen3", "Qwen3", num_key_value_heads=half, head_dim=lambda s: s.D)
library("qwen3-moe", "Qwen3Moe", num_key_value_heads=half, head_dim=lambda s: s.D, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True)  # fmt: skip
library("gemma", "Gemma", num_key_value_heads=1, head_dim=lambda s: s.D)
library("gemma2-softcaps", "Gemma2", num_key_value_heads=half, head_dim=lambda s: s.D, query_pre_attn_scalar=8,
        layer_types=every_other_sliding, sliding_window=5)  # fmt: skip
library("gemma3", "Gemma3", num_key_value_heads=half, head_dim=lambda s: s.D, query_pre_attn_scalar=8,
        layer_types=every_other_sliding, sliding_window=5, config="Gemma3TextConfig")  # fmt: skip
library("phi", "Phi", rope_parameters=dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=0.5))
library("phi3", "Phi3")
# Falcon ignores attention_dropout in its fast attention, a bug of the library, so it is set to 0 here
library("falcon", "Falcon", attention_dropout=0.0, new_decoder_architecture=False, multi_query=True, parallel_attn=True)
library("falcon-alibi", "Falcon", attention_dropout=0.0, alibi=True, multi_query=False, parallel_attn=False, bias=True)
library("bloom", "Bloom")
library("mpt", "Mpt", expansion_ratio=4)
library("opt", "OPT", word_embed_proj_dim=lambda s: s.C)
library("opt-post-norm", "OPT", word_embed_proj_dim=lambda s: s.C, do_layer_norm_before=False)
library("cohere", "Cohere", num_key_value_heads=half)
library("stablelm", "StableLm", num_key_value_heads=half)
library("olmo", "Olmo")
library("olmo2-post-norm", "Olmo2")
library("starcoder2", "Starcoder2", num_key_value_heads=half, sliding_window=None)
library("biogpt", "BioGpt")
library("xglm", "XGLM")
library("granite", "Granite", num_key_value_heads=half)
library("nemotron", "Nemotron", num_key_value_heads=half)
library("persimmon", "Persimmon")
library("gpt-oss-sinks", "GptOss", num_key_value_heads=half, head_dim=lambda s: s.D, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=5, layer_types=every_other_sliding,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0))  # fmt: skip
library("smollm3-some-without-positions", "SmolLM3", num_key_value_heads=half, no_rope_layers=lambda s: [1, 0] * s.L)


# -- x-transformers: one decoder with many options


def x_transformer(
    name: str,
    *,
    absolute: bool = False,
    wrapper: dict[str, Any] | None = None,
    mask: bool = True,
    fault: str = "",
    **switches: Any,
) -> None:
    """Adds one of its decoders; `mask=False`: padding is not tested; `fault`: the check that finds a bug in it."""

    def build(vocab_size, block_size, n_layer, n_head, n_embd, dropout):
        from loguru import logger
        from x_transformers import Decoder, TransformerWrapper

        logger.disable("x_transformers")  # it logs a warning for small heads
        layers = Decoder(dim=n_embd, depth=n_layer, heads=n_head, attn_dim_head=n_embd // n_head, attn_dropout=dropout,
                         ff_dropout=dropout, **switches)  # fmt: skip
        return TransformerWrapper(num_tokens=vocab_size, max_seq_len=block_size, attn_layers=layers,
                                  emb_dropout=dropout, use_abs_pos_emb=absolute, **(wrapper or {}))  # fmt: skip

    def call(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return model(tokens)
        return model(tokens, mask=mask, **(dict(pos=(mask.long().cumsum(1) - 1).clamp(min=0)) if absolute else {}))

    make = functools.partial(Called, f"x-{name}", build, call, mask=mask)
    if fault:
        FAULTY[f"x-{name}"] = (fault, make)
    else:
        CONTROLS[f"x-{name}"] = make


x_transformer("absolute", absolute=True)
x_transformer("rotary", rotary_pos_emb=True)
x_transformer("alibi", alibi_pos_bias=True)
x_transformer("t5-bias", rel_pos_bias=True)
x_transformer("no-positions")
x_transformer("post-norm", absolute=True, pre_norm=False)
x_transformer("sandwich-norm", rotary_pos_emb=True, sandwich_norm=True)
x_transformer("grouped", rotary_pos_emb=True, attn_kv_heads=2)
x_transformer("qk-norm", rotary_pos_emb=True, attn_qk_norm=True)
x_transformer("glu", rotary_pos_emb=True, ff_glu=True, ff_swish=True)
x_transformer("scale-norm", absolute=True, use_scalenorm=True)
x_transformer("rms-norm-squared-relu", rotary_pos_emb=True, use_rmsnorm=True, ff_relu_squared=True)
x_transformer("flash", rotary_pos_emb=True, attn_flash=True)
x_transformer("residual-attention", rotary_pos_emb=True, residual_attn=True)
x_transformer("macaron", rotary_pos_emb=True, macaron=True)
x_transformer("shifted-tokens", rotary_pos_emb=True, shift_tokens=1, mask=False)
x_transformer("memory-keys", rotary_pos_emb=True, attn_num_mem_kv=3)
x_transformer("embedding-norm", absolute=True, wrapper=dict(post_emb_norm=True))
# Its feed-forward gets no mask, and shifts features of the left padding into the first real token.
x_transformer("shifted-padding", rotary_pos_emb=True, shift_tokens=1,
              fault="check_masking.check_pad_contents_change_nothing")  # fmt: skip
# Its output head is a lambda that holds the original model: a deep copy still uses the original's embedding.
x_transformer("tied-embedding", absolute=True, wrapper=dict(tie_embedding=True),
              fault="check_contract.check_copies_are_independent")  # fmt: skip


# -- torch.nn.TransformerEncoder with a causal mask


def encoder(name: str, *, norm_first: bool, activation: str) -> None:
    class CausalEncoder(nn.Module):
        """torch.nn.TransformerEncoder with embeddings, learned positions, a causal mask and an output head."""

        def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, dropout):
            super().__init__()
            self.tokens = nn.Embedding(vocab_size, n_embd)
            self.positions = nn.Embedding(block_size, n_embd)
            layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, dropout, activation=activation,
                                               batch_first=True, norm_first=norm_first)  # fmt: skip
            norm = nn.LayerNorm(n_embd) if norm_first else None
            self.encoder = nn.TransformerEncoder(layer, n_layer, norm, enable_nested_tensor=False)
            for layer in self.encoder.layers:  # TransformerEncoder copies one layer: initialize each anew
                for module in layer.modules():
                    if isinstance(module, nn.Linear | nn.MultiheadAttention):
                        module._reset_parameters() if hasattr(
                            module, "_reset_parameters"
                        ) else module.reset_parameters()
            self.head = nn.Linear(n_embd, vocab_size)

        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            T = tokens.shape[1]
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)
            x = self.tokens(tokens) + self.positions(torch.arange(T, device=tokens.device))
            return self.head(self.encoder(x, mask=causal, is_causal=True))

    def build(**sizes: Any) -> nn.Module:
        return CausalEncoder(**sizes)

    CONTROLS[name] = functools.partial(Called, name, build, lambda model, tokens, mask: model(tokens), mask=False)


encoder("torch-encoder-post-norm", norm_first=False, activation="relu")
encoder("torch-encoder-pre-norm", norm_first=True, activation="gelu")
