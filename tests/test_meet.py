"""Ways in which public code builds and calls its models, a small file each: it loads, and its header has the facts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transformer_checks.checks.check_contract import check_every_length_is_read
from transformer_checks.checks.expect import NotApplicable
from transformer_checks.checks.meet.build import Recipe
from transformer_checks.checks.meet.forward import Forward
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

HERE = Path(__file__).parent / "conventions"

# file[:NAME] -> facts in its header
FACTS = {
    "additive_mask.py": ("GPT(vocab_size, block_size, n_embd, n_head, n_layer)", "mask [B, T] float32, 0 keeps, -inf"),
    "annotated_dictionary.py": (
        "a configuration with the settings that the code reads(",
        "vocab_size, d_model, max_seq_len, number_of_transformer_block, num_heads",
    ),
    "asks_for_logits.py": ("forward(idx, get_logits) → dict with .logits logits",),
    "caches_filled.py": ("forward(idx, kv_caches) → (logits, ",),
    "keywords_passed_on.py": ("Model(vocab_size, block_size, width, heads)", "tiny=1e-06"),
    "latent_attention.py": ("num_key_value_heads=4", "head_dim=8"),
    "letters.py": ("Model(V, T_max, D, H)", "stretch=0.5", "stretch is taken from", "letters.py"),
    "loss_only.py": ("forward returns only a loss", "drops the last token: one is added"),
    "names_in_words.py": (
        "my_vocab_size, max_decoding_length, dim_vector, number_of_my_heads, num_decoder_stack_layers",
    ),
    "needed_though_optional.py": ("rope_theta=10000.0",),
    "nested_keys.py": (
        "a configuration with the settings that the code reads(n_embd, vocab_size, block_size, n_head)",
        "is_causal=True",
    ),
    "parts_by_name.py": ("input_dim, hid_dim", "output_dim", "encoder='Encoder(…)'", "decoder='Decoder(…)'"),
    "reads_itself/kit/model.py": ("Config(vocab_size, block_size, n_embd)",),
    "script_beside/model.py": ("data.py is a script", "data could not be imported: a placeholder is used"),
    "settings/model.py": (
        "residual_multiplier=0.25, parallel_block=False",
        "residual_multiplier is taken from",
        "default.yaml",
        "parallel_block is taken from",
        "options.py",
    ),
    "shared_sizes/model.py": ("LanguageModel(CONTEXT_LENGTH, vocab_size, embedding_size, num_layers)",),
    "sizes_under_main.py": ("Transformer(d_model, max_len, n_heads, n_layers, vocab_size)",),
    "attention_mask_of_integers.py": ("padding mask: attention_mask [B, T] int64, true keeps",),
    "attributes_only.py": ("a configuration with the settings that the code reads", "max_seq_len"),
    "bidirectional_by_default.py": ("Model(words, dims, heads, layers)", "bidirectional=False"),
    "cache_inside.py": ("cache ✓ (use_cache=True, reset_cache())",),
    "cache_of_a_type.py": ("cache ✓ (cache=KVCache())",),
    "cache_of_some_layers.py": ("forward(idx, use_cache) → (logits, None)",),
    "cache_object.py": ("cache ✓ (cache=KVCache())",),
    "caches_at_a_place.py": ("forward(tokens, start_pos) → logits", "cache ✓ (start_pos=)"),
    "caches_of_each_block.py": ("cache ✓ (caches=[KVCache(), …])",),
    "caches_set_up.py": ("setup_caches(B, block size) is called", "cache ✓ (setup_caches, input_pos=)"),
    "causal_by_a_switch.py": ("use_causal_attention=True",),
    "causal_mask_handed.py": (
        "a causal mask is passed as mask (True keeps), as in causal_mask_handed.py:37",
        "cache ✗",
    ),
    "classes_first.py": ("→ logits [B, V, T]",),
    "compared_string.py": ("norm_place='pre'",),
    "config_class_attributes.py": ("Config(",),
    "config_from_a_dictionary_or_none.py": ("Config(", "n_layer", "n_embd", "block_size", "vocab_size"),
    "config_class_with_kwargs.py": ("GPTConfig(", "n_layer", "n_head", "n_embd"),
    "settings_by_a_letter.py": ("Knobs(", "hidden", "n_heads", "n_layers", "seq_len"),
    "configuration_as_a_named_tuple.py": ("NearConfig(", "hidden_size", "num_layers"),
    "masked_language_model.py": ("it looks both ways, as Bert in its name says", "pad_id=43"),
    "course_contract.py": ("also found: tokenizer", "load_model_and_tokenizer(its folder)"),
    "data_is_missing.py": (
        "FileNotFoundError at import",
        "logs_of_nowhere could not be imported: a placeholder is used",
    ),
    "dataclass_config.py": ("GPTConfig(", "forward(idx, targets) → (logits, loss)", "ignore_index -1", "generate ✗"),
    "default_config_method.py": ("get_default_config()(", "vocab_size"),
    "dict_constant.py": ("CONFIG(vocab_size, seq_len, d_model, num_heads, num_layers)",),
    "dict_in_main.py": ("a dictionary(vocab_size, context_length, emb_dim, n_heads, n_layers)",),
    "dict_of_outputs.py": ("forward(idx) → dict with", ".logits logits"),
    "drops_its_last_token.py": ("drops the last token: one is added",),
    "encode_decode_project.py": ("encode, decode, project → logits", "source sentence is fixed"),
    "encoder_decoder.py": ("forward(src, tgt, src_mask, tgt_mask) → logits", "src is a fixed source"),
    "exact_length.py": ("shorter inputs are padded on the right",),
    "extras_beside_logits.py": ("→ (logits, [",),
    "factory.py": ("build_model(vocab_size, block_size)", "also found: loss"),
    "factory_with_a_name_of_its_own.py": (
        "make_model(vocab, max_len, d_model, h, N)",
        "the Assembled is taken as the model",
    ),
    "flat_logits.py": ("→ logits [B·T, V]",),
    "folder_of_its_name/model/model.py": (
        "Llama(vocab_size, dim, n_layers, max_position_embeddings)",
        "forward(tokens)",
    ),
    "guarded_import.py": ("forward(idx) → logits",),
    "half_precision_on_a_gpu.py": ("device='cpu'", "dtype=torch.float32"),
    "head_beside.py": ("generator(forward(idx)) → logits", "log-probabilities"),
    "initialized_by_hand.py": ("init_weights() is called after construction",),
    "instance.py:model": ("instance.py:model", "one instance, at its own sizes"),
    "key_padding_mask.py": ("padding mask: key_padding_mask [B, T] bool, true drops",),
    "keywords.py": ("GPT(hidden_size, num_hidden_layers, num_attention_heads, vocab_size, max_position_embeddings)",),
    "log_probabilities.py": ("returns log-probabilities",),
    "loss_on_the_model.py": ("forward(tokens, targets) → logits",),
    "mask_in_place_of_its_own.py": ("padding mask: mask [B, 1, T, T] bool, true keeps",),
    "missing_libraries.py": ("wandb_of_nowhere could not be imported: a placeholder is used",),
    "module_globals.py": ("GPT(block_size, n_embd, n_head, n_layer, vocab_size)",),
    "nested_config.py": ("Config(vocab_size, max_len, width, heads, layers)",),
    "forward_for_training.py": ("forward_training(",),
    "lightning_is_missing.py": ("Model(vocab_size, d_model, num_heads, context_length)",),
    "names_of_the_figure.py": ("GPT(n_vocab, chan_dim, n_heads, Nx, max_context)",),
    "notebook.ipynb": ("notebook.ipynb is a notebook", "not cell 6"),
    "numpy_class.py": ("f(array) → ", "NumPy arrays"),
    "object_with_logits.py": ("→ Output with .logits logits",),
    "one_token_at_a_time.py": ("forward(tokens, start_pos)", "one token at a time"),
    "one_sequence.py": ("OneSequence(num_tokens, d_model, max_len)", "one sequence [T] at a time"),
    "own_configuration_breaks.py": ("with GPTConfig as it is", "raises AttributeError", "built another way"),
    "padded_vocabulary.py": ("vocabulary padded from 17 to 24",),
    "padding_id.py": ("pad_idx=17", "pad_idx is an id that no check uses"),
    "blocks_of_dataclasses.py": ("→ Answer", "cache ✓ (kv_caches=, returned)"),
    "past_appended_by_the_caller.py": ("cache ✓ (past=, returned for its own tokens, appended by the caller)",),
    "past_given_back.py": ("cache ✓ (past=, returned)",),
    "positional_odd_order.py": ("GPT(heads, emb_dim, ctx_len, num_tokens, depth)",),
    "positions_required.py": ("forward(idx, input_pos) → logits",),
    "preset_factory.py": ("preset_factory.py:GPT · GPT(vocab_size, block_size, n_embd)",),
    "preset_or_sizes.py": ("GPTConfig(", "model_type=None"),
    "presets.py": ("GPT(n_layer, n_head, n_embd)",),
    "presets_in_configuration.py": (
        "a configuration with the settings that the code reads(",
        "vocab_size, n_embd, context_size",
    ),
    "project/pkg/model.py": (
        "Config(vocab_size, seq_len, d_model, n_heads, n_layers)",
        "PackageNotFoundError at import",
    ),
    "rows_of_ids.py": ("one row of ids at a time",),
    "script_that_trains.py": ("script_that_trains.py is a script", "not lines"),
    "start_position.py": ("forward(tokens, start_pos) → logits",),
    "targets_of_another_name.py": ("forward(idx) → (logits, None)", "truth takes the targets: it changes the loss"),
    "targets_required.py": ("forward(idx, truth) → (logits, loss)", "truth takes the targets: it changes the loss"),
    "time_first.py": ("forward([T, B] src) → logits", "the time axis comes first"),
    "tokenizer_argument.py": ("GPT(", "vocab_size"),
    "width_named_twice.py": ("hidden_size=32",),
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Subject]:
    return {}


def load(loaded: dict[str, Subject], name: str) -> Subject:
    if name not in loaded:
        loaded[name] = subject_of(str(HERE / name))
    return loaded[name]


def test_there_is_a_test_for_every_file():
    files = {str(path.relative_to(HERE)) for path in HERE.iterdir() if path.is_file()}
    assert files == {name.partition(":")[0] for name in FACTS if "/" not in name}
    assert len(FACTS) >= 30


@pytest.mark.parametrize("name", FACTS)
def test_its_logits_have_a_place_for_every_token(loaded, name):
    subject = load(loaded, name)
    model, T = subject.build(), min(5, subject.sizes.block_size)
    logits = subject.logits(model, subject.tokens(2, T))
    assert logits.shape == (2, T, subject.sizes.vocab_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", FACTS)
def test_its_header_states_the_facts(loaded, name):
    header = load(loaded, name).header
    for fact in FACTS[name]:
        assert fact in header


@pytest.mark.parametrize("name", FACTS)
def test_its_logits_do_not_depend_on_later_tokens(loaded, name):
    """So its time axis, its masks and the tokens that it drops were all recognised."""
    subject = load(loaded, name)
    if not subject.causal:  # as its header says
        assert "looks both ways" in FACTS[name][0]
        return
    model = subject.build()
    tokens = subject.tokens(3, 6, seed=1)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % subject.sizes.vocab_size
    one, two = subject.logits(model, tokens), subject.logits(model, other)
    assert torch.equal(one[:, :4], two[:, :4])
    assert not torch.equal(one[:, 4:], two[:, 4:])


@pytest.mark.parametrize("name", FACTS)
def test_it_is_built_in_other_sizes_if_it_takes_them(loaded, name):
    subject = load(loaded, name)
    sizes = {key: value for key, value in dict(vocab_size=24, block_size=16).items() if subject.can_vary(key)}
    model = subject.build(seed=3, **sizes)
    vocabulary = sizes.get("vocab_size", subject.sizes.vocab_size)
    length = min(sizes.get("block_size", subject.sizes.block_size), 16)
    tokens = subject.tokens(2, length, vocab_size=vocabulary)
    assert subject.logits(model, tokens).shape == (2, length, vocabulary)


def test_a_file_read_only_for_its_configuration_does_not_set_ignore_index(loaded):
    """A file beside the model, imported only to look for a configuration, has an ignore_index."""
    assert "ignore_index" not in load(loaded, "nested_keys.py").header


@pytest.mark.parametrize("name", ["keywords.py", "dataclass_config.py", "key_padding_mask.py", "cache_object.py"])
def test_loading_takes_a_few_models_and_a_few_forwards(name, monkeypatch):
    """This bounds its time on any machine. Masks and caches are recognised by trying, which takes more forwards."""
    built, called = [], []
    build, run = Recipe.build, Forward.raw
    monkeypatch.setattr(Recipe, "build", lambda self, sizes: built.append(sizes) or build(self, sizes))
    monkeypatch.setattr(Forward, "raw", lambda self, *args, **more: called.append(more) or run(self, *args, **more))
    assert "forward" in subject_of(str(HERE / name)).header
    assert 1 <= len(built) <= 4
    assert 1 <= len(called) <= (60 if "mask" in name or "cache" in name else 8)


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    subject = subject_of(str(HERE / "keywords.py"))
    one, again, other = (subject.build(seed=seed).tokens.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_one_instance_is_restored_before_each_use():
    subject = subject_of(str(HERE / "instance.py:model"))
    before = subject.build().head.weight.detach().clone()
    model = subject.amplified()
    assert model.head.weight.dtype == torch.float64
    again = subject.build()
    assert again.head.weight.dtype == before.dtype and torch.equal(again.head.weight, before)
    assert not subject.builds_afresh and not subject.can_vary("n_layer")
    assert (subject.sizes.vocab_size, subject.sizes.block_size, subject.sizes.n_layer) == (23, 11, 3)


REFUSES = """
from torch import nn


class GPT(nn.Module):
    def __init__(self, vocab_size=31, n_embd=16, dropout=0.0):
        super().__init__()
        if dropout > 0:
            raise {error}("no dropout here")
        self.embed, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx):
        return self.head(self.embed(idx).cumsum(1))
"""


@pytest.mark.parametrize(("error", "raised"), [("ValueError", NotApplicable), ("TypeError", TypeError)])
def test_a_size_that_the_model_refuses_on_purpose_is_not_applicable(tmp_path, error, raised):
    (tmp_path / "model.py").write_text(REFUSES.format(error=error))
    subject = subject_of(str(tmp_path / "model.py"))
    assert subject.can_vary("dropout")
    with pytest.raises(raised, match="no dropout here"):
        subject.build(dropout=0.2)


def test_a_model_of_one_length_is_told_as_that(loaded):
    subject = load(loaded, "exact_length.py")
    assert subject.padded_up and not load(loaded, "keywords.py").padded_up
    found = judge(check_every_length_is_read, subject, {})
    assert found.outcome == "not_applicable" and "exactly 13 tokens" in found.says
    assert "padded on the right" in found.remarks[0]
