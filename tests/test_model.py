"""The reference model: its paths agree with each other, and its edges are clear errors or finite numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_models import amplified

from transformer_checks.transformer.model import PARTS, KeyValueCache, ModelConfig, Transformer, gpt2, llama

FAMILIES = {"gpt2": gpt2, "llama": llama}
SIZES = dict(vocab_size=13, block_size=11, n_layer=2, n_head=4, n_embd=24)
thorough = settings(max_examples=40, deadline=None, derandomize=True, database=None)

family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def random_tokens(B: int, T: int, seed: int = 0, V: int = 13) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def padding_mask(pads: list[int], T: int, side: str) -> torch.Tensor:
    mask = torch.arange(T) >= torch.tensor(pads)[:, None]
    return mask if side == "left" else mask.flip(1)


# --- paths that must agree


@thorough
@given(data=st.data(), name=st.sampled_from(list(FAMILIES)), groups=st.sampled_from((1, 2, 4)))
def test_cached_equals_uncached_for_every_partition_batch_and_padding(data, name, groups):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 11))
    cuts = data.draw(st.sets(st.integers(1, T - 1) if T > 1 else st.nothing()))
    side = data.draw(st.sampled_from(("none", "left", "right")))
    pads = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))  # T: a row with nothing real in it
    capacity = data.draw(st.integers(T, 14))
    model = amplified(FAMILIES[name](**SIZES, n_kv_head=groups), seed=data.draw(st.integers(0, 99)))
    tokens = random_tokens(B, T)
    mask = None if side == "none" else padding_mask(pads, T, side)
    cache, edges = model.new_cache(B, capacity), [0, *sorted(cuts), T]
    with torch.no_grad():
        chunks = [model(tokens[:, a:b], None if mask is None else mask[:, a:b], cache) for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.cat(chunks, 1), model(tokens, mask), rtol=0, atol=1e-11)
    assert cache.length == T


@family
def test_cached_equals_uncached_in_float32(family):
    model = amplified(family(**SIZES), seed=0).float()
    tokens, cache = random_tokens(3, 11), model.new_cache(3, 11)
    with torch.no_grad():
        chunks = [model(tokens[:, t : t + 1], cache=cache) for t in range(11)]
        expected = model(tokens)
        assert (torch.cat(chunks, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_mask_given_only_with_the_first_chunk_holds_for_the_later_ones():
    model = amplified(gpt2(**SIZES), seed=0)
    tokens, mask = random_tokens(3, 9), padding_mask([0, 2, 3], 9, "left")
    cache = model.new_cache(3, 9)
    with torch.no_grad():
        chunks = [model(tokens[:, :4], mask[:, :4], cache), model(tokens[:, 4:8], cache=cache)]
        chunks.append(model(tokens[:, 8:], cache=cache))
        torch.testing.assert_close(torch.cat(chunks, 1), model(tokens, mask), rtol=0, atol=1e-11)


@thorough
@given(data=st.data(), name=st.sampled_from(list(FAMILIES)))
def test_explicit_attention_equals_the_fused_kernel_forward_and_backward(data, name):
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 11))
    side = data.draw(st.sampled_from(("none", "left", "right")))
    pads = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    config = FAMILIES[name](**SIZES, n_kv_head=2)
    fused, explicit = (amplified(replace(config, attention=kind), seed=T) for kind in ("fused", "explicit"))
    tokens, mask = random_tokens(B, T), None if side == "none" else padding_mask(pads, T, side)
    logits = [model(tokens, mask) for model in (fused, explicit)]
    weights = torch.randn(logits[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad(x, m.parameters(), weights) for x, m in zip(logits, (fused, explicit), strict=True)
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_explicit_attention_reads_a_cache_too():
    model = amplified(llama(**SIZES, attention="explicit"), seed=0)
    tokens, cache = random_tokens(2, 11), model.new_cache(2, 11)
    with torch.no_grad():
        chunks = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 11))]
        torch.testing.assert_close(torch.cat(chunks, 1), model(tokens), rtol=0, atol=1e-11)


@family
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_under_the_padding_does_not_matter(family, side):
    model = amplified(family(**SIZES), seed=0)
    tokens, mask = random_tokens(3, 9), padding_mask([0, 2, 8], 9, side)
    other = torch.where(mask, tokens, random_tokens(3, 9, seed=1))
    assert not torch.equal(tokens, other)
    with torch.no_grad():
        assert torch.equal(model(tokens, mask)[mask], model(other, mask)[mask])


@family
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_mask_may_be_bool_integer_or_float(family, dtype):
    model = amplified(family(**SIZES), seed=0)
    tokens, mask = random_tokens(3, 9), padding_mask([0, 2, 8], 9, "left")
    with torch.no_grad():
        assert torch.equal(model(tokens, mask.to(dtype)), model(tokens, mask))


@family
@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_rows_of_nothing_but_padding_are_finite_and_so_are_their_gradients(family, attention):
    model = amplified(family(**SIZES, attention=attention), seed=0).train()
    tokens, mask = random_tokens(3, 9), padding_mask([9, 4, 0], 9, "left")
    logits = model(tokens, mask)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(logits[1:], model(tokens[1:], mask[1:]), rtol=0, atol=1e-11)


@family
def test_no_tokens_give_no_logits(family):
    assert Transformer(family(**SIZES))(random_tokens(2, 0)).shape == (2, 0, 13)


# --- what the parts are


def test_dropout_acts_in_training_only_and_at_every_site():
    """Embedding, attention weights and both sublayer outputs: with one site alone left on, two calls still differ."""
    model = amplified(gpt2(**{**SIZES, "n_layer": 1}, dropout=0.5), seed=0)
    tokens = random_tokens(2, 9)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    sites = {"embedding": model.dropout, "attention": model.blocks[0].attention, "sublayers": model.blocks[0].dropout}
    for on in sites:
        for name, site in sites.items():
            rate = 0.5 if name == on else 0.0
            site.__dict__["dropout" if name == "attention" else "p"] = rate
        assert not torch.equal(model(tokens), model(tokens)), on


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_dropped_attention_weights_average_to_the_undropped_ones(attention):
    """Of 4000 draws the mean is within 5 standard errors, and dropping is not a no-op."""
    torch.manual_seed(0)
    kept = ModelConfig(**SIZES, attention=attention, dropout=0.25)
    layer = PARTS["attention"][attention](kept, 0)
    q, k, v = torch.randn(3, 1, 4, 5, 6)
    expected = layer.eval().attend(q, k, v, None)
    draws = layer.train().attend(*(x.expand(4000, -1, -1, -1) for x in (q, k, v)), None)
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - expected) / (draws.std(0) / 4000**0.5)).abs().max() < 5


@family
def test_initialization_is_as_published(family):
    """Deviation 0.02, and 0.02 / √(2 layers) where the residual stream is written: to 5 standard errors."""
    torch.manual_seed(0)
    model = Transformer(family(vocab_size=300, block_size=200, n_layer=3, n_head=4, n_embd=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = 0.02 / 6**0.5 if name.endswith("output.weight") else 0.02
            assert abs(p.std() / std - 1) < 5 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name


def test_parameters_are_counted_as_published():
    """GPT-2's 124 million, the head counted once; Llama 2's 7 billion, on the meta device."""
    with torch.device("meta"):
        small = Transformer(gpt2(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
        large = Transformer(
            llama(vocab_size=32000, block_size=4096, n_layer=32, n_head=32, n_embd=4096, n_hidden=11008)
        )
    assert sum(p.numel() for p in small.parameters()) == 124_439_808
    assert sum(p.numel() for p in large.parameters()) == 6_738_415_616


@pytest.mark.parametrize(("width", "hidden"), [(128, 344), (384, 1024), (512, 1368)])
def test_a_gated_feed_forward_is_two_thirds_as_wide_rounded_up_to_eight(width, hidden):
    assert llama(n_embd=width).hidden == hidden
    assert gpt2(n_embd=width).hidden == 4 * width


def test_a_tied_head_is_one_parameter_and_an_untied_one_is_not():
    for tied in (True, False):
        model = Transformer(gpt2(**SIZES, tied=tied))
        assert (model.head.weight is model.embedding.weight) == tied
        assert ("head.weight" in dict(model.named_parameters())) != tied


def test_rotary_angles_keep_apart_positions_that_bfloat16_cannot():
    model = Transformer(llama(**{**SIZES, "block_size": 600})).bfloat16()
    angles = model.positions.angles(torch.tensor([256, 257]), torch.bfloat16)
    assert angles.dtype == torch.float32 and angles[0, 0] != angles[1, 0]


@family
def test_weights_survive_saving_and_loading(family, tmp_path):
    model, other = (amplified(family(**SIZES), seed) for seed in (0, 1))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(model(random_tokens(2, 5)), other(random_tokens(2, 5)))


# --- refusals


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
        (dict(block_size=-1), "block_size must be at least 1, got -1"),
        (dict(n_layer=0), "n_layer must be at least 1, got 0"),
        (dict(n_head=0), "n_head must be at least 1, got 0"),
        (dict(n_embd=0), "n_embd must be at least 1, got 0"),
        (dict(n_kv_head=0), "n_kv_head must be at least 1, got 0"),
        (dict(n_hidden=-3), "n_hidden must be at least 1, got -3"),
        (dict(n_head=5, n_embd=24), r"n_embd \(24\) must be a multiple of n_head \(5\)"),
        (dict(n_head=4, n_kv_head=3), r"n_head \(4\) must be a multiple of n_kv_head \(3\)"),
        (dict(n_head=2, n_kv_head=4), r"n_head \(2\) must be a multiple of n_kv_head \(4\)"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
        (dict(dropout=float("nan")), r"dropout must be in \[0, 1\), got nan"),
        (dict(positions="rotary", n_head=4, n_embd=12), "even head width, got n_embd / n_head = 3"),
        (dict(norm_eps=-1.0), "norm_eps must be at least 0, got -1.0"),
        (dict(rope_base=0.0), "rope_base must be above 0, got 0.0"),
        (dict(positions="alibi"), "positions must be one of learned, rotary, rotary-interleaved, got 'alibi'"),
        (dict(norm="batch"), "norm must be one of layer, rms, got 'batch'"),
        (dict(feed_forward="relu"), "feed_forward must be one of gelu, swiglu, got 'relu'"),
        (dict(attention="flash"), "attention must be one of fused, explicit, got 'flash'"),
    ],
)
def test_a_bad_config_is_refused_by_field_and_value(fields, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**fields)


@pytest.mark.parametrize("bad", [-1, 13, 99])
def test_a_token_outside_the_vocabulary_is_named_and_the_cache_left_as_it_was(bad):
    model = Transformer(gpt2(**SIZES))
    tokens, cache = random_tokens(2, 5), model.new_cache(2, 9)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary: 0 to 12"):
        model(torch.tensor([[1, 2], [bad, 3]]), cache=cache)
    assert cache.length == 5


@pytest.mark.parametrize(
    ("tokens", "mask", "read", "named"),
    [
        ((2, 12), None, 0, "12 tokens do not fit the block size of 11"),
        ((2, 4), None, 8, "12 tokens do not fit the block size of 11"),
        ((2, 3), None, 8, r"the cache has 2 rows of 10 tokens, 8 of them read: tokens of shape \[2, 3\]"),
        ((1, 2), None, 8, r"the cache has 2 rows of 10 tokens, 8 of them read: tokens of shape \[1, 2\]"),
        ((5,), None, 0, r"tokens must be \[B, T\], got the shape \[5\]"),
        ((2, 5), (2, 4), 0, r"mask must have the tokens' shape \[2, 5\], got \[2, 4\]"),
        ((2, 5), (5,), 0, r"mask must have the tokens' shape \[2, 5\], got \[5\]"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape_and_nothing_is_read(tokens, mask, read, named):
    model = Transformer(gpt2(**SIZES))
    cache = model.new_cache(2, 10) if read else None
    if cache is not None:
        model(random_tokens(2, read), cache=cache)
    with pytest.raises(ValueError, match=named):
        model(torch.zeros(tokens, dtype=torch.long), None if mask is None else torch.ones(mask), cache)
    assert cache is None or cache.length == read


def test_a_cache_lives_where_the_weights_are_in_their_precision():
    model = Transformer(llama(**SIZES, n_kv_head=2)).bfloat16()
    cache = model.new_cache(3, 7)
    assert isinstance(cache, KeyValueCache) and cache.keys.dtype == torch.bfloat16
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 7, 6)
