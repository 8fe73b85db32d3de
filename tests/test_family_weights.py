"""Weights are mapped onto the reference without a table, whatever their names and layout."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest

from transformer_checks.checks.bugs.designs import no_positions
from transformer_checks.checks.family.fit import fit_to
from transformer_checks.checks.family.specimen import Fit
from transformer_checks.checks.family.weights import inventory
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.subject import Subject

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import x_transformers
FOREIGN = Path(__file__).parent / "foreign"
# What is found in each file: how queries, keys and values are stored, and the variant.
STYLES = {
    "conv1d_fused": ("fused", "qkv|3hd", ["tanh GELU", "epsilon 1e-05"]),
    "einsum_heads": ("split", "qkv|hd", ["tanh GELU", "epsilon 1e-05"]),
    "fused_by_head": ("fused", "kvq|h3d", ["exact GELU", "epsilon 1e-06"]),
    "last_position": ("fused", "qkv|3hd", ["exact GELU", "epsilon 1e-05"]),
    "llama_complex": ("split", "qkv|hd", ["interleaved RoPE, base 10000", "epsilon 1e-06"]),
    "llama_fused": ("fused", "qkv|3hd", ["rotate-half RoPE, base 10000", "epsilon 1e-05"]),
    "separate_heads": ("per head", "kqv|hd", ["exact GELU", "epsilon 1e-05"]),
    "split_feature_first": ("split", "vqk|dh", ["tanh GELU", "epsilon 1e-05"]),
    "stacked_layers": ("split", "qkv|hd", ["tanh GELU", "epsilon 1e-05"]),
    "torch_parts": ("fused", "qkv|3hd", ["exact GELU", "epsilon 1e-05"]),
}


def family(name: str) -> str:
    return "llama" if "llama" in name else "gpt2"


def foreign(name: str, seed: int = 5, spec: str = "auto") -> Subject:
    return subject_of(str(FOREIGN / f"{name}.py"), seed=seed, spec=spec)


def agrees(fit: Fit) -> Fit:
    assert fit.agrees, f"{fit.error} {fit.why_not} {fit.variant} {fit.tried}"
    return fit


def test_every_foreign_file_has_its_expected_result():
    assert {path.stem for path in FOREIGN.glob("*.py")} == set(STYLES)


@pytest.mark.parametrize("name", STYLES)
def test_a_from_scratch_model_agrees_without_a_table(name):
    found = agrees(fit_to(foreign(name), family(name)))
    assert (found.plan.form, found.plan.arrangement, found.variant.words()) == STYLES[name]
    assert found.plan.unplaced == ()


def hashed(name: str) -> str:
    return ".".join("n" + hashlib.md5(part.encode()).hexdigest()[:6] for part in name.split("."))


@pytest.mark.parametrize("name", STYLES)
def test_hidden_names_do_no_harm(name, monkeypatch):
    by_identity = inventory._by_identity

    def without_names(model):
        weights = by_identity(model)
        for weight in weights:
            weight.name, weight.names = hashed(weight.name), [hashed(each) for each in weight.names]
        return weights

    monkeypatch.setattr(inventory, "_by_identity", without_names)
    found = agrees(fit_to(foreign(name), family(name)))
    assert found.plan.inventory.weights[0].name.startswith("n")


# -- libraries


def hf_gpt2(vocab_size, block_size, n_layer, n_head, n_embd, dropout):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def hf_llama(groups, **switches):
    def llama(vocab_size, block_size, n_layer, n_head, n_embd):
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=block_size, num_hidden_layers=n_layer, hidden_size=n_embd,
            num_attention_heads=n_head, num_key_value_heads=max(n_head // groups, 1), intermediate_size=3 * n_embd + 8,
            bos_token_id=None, eos_token_id=None, **switches,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return llama


def x_llama(groups):
    def x_transformers_llama(vocab_size, block_size, n_layer, n_head, n_embd):
        from loguru import logger

        logger.disable("x_transformers")  # it logs a warning about small heads
        width = n_embd // n_head
        layers = x_transformers.Decoder(
            dim=n_embd, depth=n_layer, heads=n_head, attn_dim_head=width, attn_kv_heads=max(n_head // groups, 1),
            rotary_pos_emb=True, rotary_emb_dim=width, use_rmsnorm=True, ff_glu=True, ff_swish=True, ff_mult=3,
        )  # fmt: skip
        return x_transformers.TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=block_size, use_abs_pos_emb=False, attn_layers=layers
        )

    return x_transformers_llama


# Query heads per key-value head, whether the head is tied, whether there are biases.
LIBRARIES = {
    "transformers' gpt2": ("gpt2", hf_gpt2, 1, True, True),
    "transformers' llama": ("llama", hf_llama(1), 1, False, False),
    "transformers' llama, grouped": ("llama", hf_llama(2), 2, False, False),
    "transformers' llama, one key-value head": ("llama", hf_llama(6), 6, False, False),
    "transformers' llama, tied": ("llama", hf_llama(2, tie_word_embeddings=True), 2, True, False),
    "transformers' llama, biased": ("llama", hf_llama(2, attention_bias=True, mlp_bias=True), 2, False, True),
    "x-transformers' llama": ("llama", x_llama(1), 1, False, False),
    "x-transformers' llama, grouped": ("llama", x_llama(2), 2, False, False),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_librarys_model_agrees_without_a_table(name):
    wanted, build, groups, tied, biased = LIBRARIES[name]
    plan = agrees(fit_to(subject_of(build, seed=5), wanted)).plan
    assert plan.shape.n_head // plan.n_kv_head == groups
    assert plan.tied == tied
    assert (plan.output.bias is not None) == biased
    assert plan.unplaced == ()


# -- RoPE scaling


LLAMA_3_SCALING = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize(
    "scaling, said",
    [(LLAMA_3_SCALING, "RoPE frequencies divided by 8 (as in Llama 3.1)"),
     (LLAMA_3_SCALING | {"factor": 5.0, "low_freq_factor": 2.0}, "RoPE frequencies divided by 5 (as in Llama 3.1)"),
     ({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}, "RoPE frequencies divided by 2 (linear scaling)"),
    ],
)  # fmt: skip
def test_rope_scaling_is_a_variant(scaling, said):
    found = agrees(fit_to(subject_of(hf_llama(2, rope_parameters=scaling), seed=5), "llama"))
    assert said in found.variant.words()


def test_a_gpt2_without_a_position_embedding_is_reported():
    found = fit_to(Subject("no positions", no_positions(), seed=0), "gpt2")
    assert not found.agrees and "no position embedding" in found.why_not
