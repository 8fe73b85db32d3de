"""Decoding equals the naive loop, samples have the stated distribution, and nothing else is touched."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_models import amplified

from transformer_checks.transformer import generation
from transformer_checks.transformer.generation import for_decoding, generate, left_pad
from transformer_checks.transformer.model import gpt2, llama

FAMILIES = {"gpt2": gpt2, "llama": llama}
SIZES = dict(vocab_size=13, block_size=9, n_layer=2, n_head=2, n_embd=24)
thorough = settings(max_examples=40, deadline=None, derandomize=True, database=None)
family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(13, (length,), generator=generator).tolist() for length in lengths]


def naive_greedy(model, row: list[int], n: int) -> list[int]:
    """One row, no batch, no mask, no cache: read the last block, take the largest logit of the last position."""
    row = list(row)
    for _ in range(n):
        logits = model(torch.tensor([row[-model.config.block_size :]]))
        row.append(int(logits[0, -1].argmax()))
    return row


def bigram(table: torch.Tensor):
    """A model whose next token depends on the latest alone; it has no config, no mode and no cache."""
    return lambda tokens: table[tokens]


# --- greedy


@thorough
@given(
    name=st.sampled_from(list(FAMILIES)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    n=st.integers(0, 20),
    seed=st.integers(0, 99),
    use_cache=st.booleans(),
)
def test_each_row_of_a_batch_equals_the_naive_loop_on_that_row_alone(name, lengths, n, seed, use_cache):
    """Cached or not, padded or not, within the block size and past it, prompts longer than it included."""
    model = amplified(FAMILIES[name](**SIZES), seed)
    prompts = random_prompts(lengths, seed)
    tokens, mask = left_pad(prompts)
    got = generate(model, tokens, n, mask=mask, use_cache=use_cache)
    assert got.shape == (len(prompts), max(lengths) + n) and got.dtype == torch.long
    for row, prompt in zip(got, prompts, strict=True):
        assert row[max(lengths) - len(prompt) :].tolist() == naive_greedy(model, prompt, n)


@family
def test_generation_can_be_continued_where_it_stopped(family):
    model = amplified(family(**SIZES), 0)
    prompt = torch.tensor(random_prompts([3, 3]))
    assert torch.equal(generate(model, generate(model, prompt, 8), 7), generate(model, prompt, 15))


@family
def test_a_cache_is_read_from_and_not_only_filled(family):
    """With a cache, each token but the prompt's is read once and alone; past the block size, whole blocks are."""
    model, widths = amplified(family(**SIZES), 0), []
    forward = model.forward
    model.forward = lambda tokens, **given: widths.append(tokens.shape[1]) or forward(tokens, **given)
    prompt = torch.tensor(random_prompts([4]))
    generate(model, prompt, 8)
    assert widths == [4, 1, 1, 1, 1, 1, 9, 9]
    widths.clear()
    generate(model, prompt, 8, use_cache=False)
    assert widths == [4, 5, 6, 7, 8, 9, 9, 9]


def test_any_callable_will_do_without_a_cache():
    model = bigram(torch.eye(5).roll(1, dims=1))  # after i comes i + 1
    assert generate(model, torch.tensor([[0], [3]]), 4, use_cache=False).tolist() == [[0, 1, 2, 3, 4], [3, 4, 0, 1, 2]]


def test_no_new_tokens_give_a_copy_of_the_prompt():
    prompt = torch.tensor([[1, 2]])
    got = generate(bigram(torch.eye(5)), prompt, 0, use_cache=False)
    assert torch.equal(got, prompt) and got.data_ptr() != prompt.data_ptr()


# --- the end token


def counting(V: int = 8):
    """After token i comes i + 1: the continuation of any prompt is known."""
    return bigram(torch.eye(V).roll(1, dims=1))


def test_a_row_that_has_ended_goes_on_with_padding_while_the_others_do_not():
    got = generate(counting(), torch.tensor([[3], [0], [4]]), 6, end=5, pad=7, use_cache=False)
    assert got.tolist() == [[3, 4, 5, 7, 7, 7], [0, 1, 2, 3, 4, 5], [4, 5, 7, 7, 7, 7]]


def test_decoding_stops_when_every_row_has_ended_and_not_before():
    assert generate(counting(), torch.tensor([[3], [1]]), 6, end=4, pad=0, use_cache=False).tolist() == [
        [3, 4, 0, 0], [1, 2, 3, 4],
    ]  # fmt: skip
    assert generate(counting(), torch.tensor([[3], [6]]), 3, end=5, use_cache=False).shape == (2, 4)


def test_an_end_token_in_the_prompt_ends_nothing():
    assert generate(counting(), torch.tensor([[5]]), 4, end=5, use_cache=False).tolist() == [[5, 6, 7, 0, 1]]


def test_without_an_end_token_a_row_may_produce_the_padding():
    assert generate(counting(), torch.tensor([[6]]), 4, pad=0, use_cache=False).tolist() == [[6, 7, 0, 1, 2]]


@family
def test_ended_rows_do_not_disturb_the_others(family):
    model = amplified(family(**SIZES), 0)
    prompt = torch.tensor(random_prompts([3] * 8))
    free = generate(model, prompt, 6)
    end = int(free[0, 4])
    ended = generate(model, prompt, 6, end=end, pad=12)
    compared = 0
    for row, expected in zip(ended, free, strict=True):
        new = expected[3:].tolist()
        kept = new.index(end) + 1 if end in new else len(new)
        compared += kept < len(new)
        assert row[3:].tolist() == (new[:kept] + [12] * 6)[: ended.shape[1] - 3]
    assert 0 < compared < 8  # some ended early, some never


@family
def test_a_seed_gives_the_same_tokens_again_cached_or_not(family):
    model = amplified(family(**SIZES), 0)
    prompt = torch.tensor(random_prompts([2, 2, 2]))

    def draw(seed: int, **how) -> torch.Tensor:
        return generate(model, prompt, 20, temperature=1.5, generator=torch.Generator().manual_seed(seed), **how)

    assert torch.equal(draw(0), draw(0))
    assert torch.equal(draw(0), draw(0, use_cache=False))
    assert not torch.equal(draw(0), draw(1))


# --- what must be left as it was found


@family
@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seeded", [True, False])
def test_mode_random_state_prompt_and_weights_are_left_as_found(family, how, seeded):
    model = amplified(family(**SIZES, dropout=0.5), 0).train()
    model.blocks[1].eval()  # a part frozen on purpose stays so
    modes = [module.training for module in model.modules()]
    prompt, mask = left_pad(random_prompts([3, 1]))
    before = prompt.clone(), mask.clone(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    got = generate(model, prompt, 12, mask=mask, generator=torch.Generator() if seeded else None, **how)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(prompt, before[0]) and torch.equal(mask, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not got.requires_grad and torch.is_grad_enabled()
    model(got[:, :9]).sum().backward()  # what came out can be trained on


@family
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_comes_out_can_be_trained_on_also_where_every_row_ended_early(family, use_cache):
    model, prompt = amplified(family(**SIZES), 0), torch.tensor([[1]])
    end = int(generate(model, prompt, 1)[0, 1])
    got = generate(model, prompt, 5, end=end, use_cache=use_cache)
    assert got.shape == (1, 2) and not got.is_inference()
    model(got).sum().backward()


def test_a_tensor_that_a_model_keeps_from_decoding_without_a_cache_can_be_trained_with():
    class Keeps(torch.nn.Module):
        """Makes its table of angles when first called, as rotary embeddings often do."""

        def __init__(self):
            super().__init__()
            self.weight, self.table = torch.nn.Parameter(torch.ones(7)), None

        def forward(self, tokens):
            if self.table is None:
                self.table = torch.arange(7.0).cos()
            return self.weight * self.table * tokens[..., None]

    model = Keeps()
    generate(model, torch.tensor([[1]]), 3, use_cache=False)
    model(torch.tensor([[1]])).sum().backward()
    assert torch.equal(model.weight.grad, model.table)


# --- a copy for decoding


@family
def test_a_copy_for_decoding_says_the_same_and_leaves_the_model_as_it_was(family):
    model = amplified(family(**SIZES, dropout=0.5), 0).train()
    weights = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    ready = for_decoding(model)
    for use_cache in (True, False):
        prompt = torch.tensor(random_prompts([3, 3]))
        assert torch.equal(generate(ready, prompt, 12, use_cache=use_cache), generate(model, prompt, 12))
    assert not any(module.training for module in ready.modules())
    assert model.training and all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name][0]) and value.stride() == weights[name][1]


@family
def test_a_copy_for_decoding_stores_columns_one_after_another_and_cannot_be_trained(family):
    ready = for_decoding(amplified(family(**SIZES), 0))
    linear = [module for module in ready.modules() if isinstance(module, torch.nn.Linear)]
    assert linear and all(layer.weight.stride(0) == 1 for layer in linear)
    assert ready.embedding.weight.is_contiguous()  # also where the head shares its values
    assert not any(p.requires_grad for p in ready.parameters())


def test_dropout_is_off_while_decoding_and_no_graph_is_built():
    model, seen = amplified(gpt2(**SIZES, dropout=0.5), 0).train(), []
    model.register_forward_hook(lambda module, _, logits: seen.append((module.training, logits.requires_grad)))
    generate(model, torch.tensor([[1]]), 3)
    assert seen == [(False, False)] * 3


def test_the_mode_is_restored_after_an_error_too():
    model = amplified(gpt2(**SIZES), 0).train()
    with pytest.raises(ValueError, match="token id 99"):
        generate(model, torch.tensor([[99]]), 3)
    assert model.training


# --- refusals


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (dict(temperature=-0.5), "temperature must be at least 0 and finite, got -0.5"),
        (dict(temperature=math.nan), "temperature must be at least 0 and finite, got nan"),
        (dict(temperature=math.inf), "temperature must be at least 0 and finite, got inf"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_k=-3), "top_k must be at least 1, got -3"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
        (dict(top_p=math.nan), r"top_p must be in \(0, 1\], got nan"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 0, got -1"),
        (dict(prompt=torch.zeros(2, 0, dtype=torch.long)), "prompt must have at least one token a row"),
        (dict(prompt=torch.zeros(3, dtype=torch.long)), r"prompt must be \[B, T\] of torch.long, got \[3\]"),
        (dict(prompt=torch.zeros(1, 2)), r"prompt must be .* torch.long, got \[1, 2\] of torch.float32"),
        (dict(mask=torch.ones(2, 3)), r"mask must have the prompt's shape \[2, 2\], got \[2, 3\]"),
        (dict(mask=torch.tensor([[1, 1], [1, 0]])), r"left padding, False then True: row 1 is \[1, 0\]"),
        (dict(mask=torch.tensor([[0, 0], [1, 1]])), r"left padding, False then True: row 0 is \[0, 0\]"),
    ],
)
def test_a_bad_argument_is_refused_by_its_value(how, named):
    arguments = dict(prompt=torch.zeros(2, 2, dtype=torch.long), max_new_tokens=1, use_cache=False)
    with pytest.raises(ValueError, match=named):
        generate(bigram(torch.eye(4)), **{**arguments, **how})


def test_a_model_without_a_cache_says_how_to_do_without():
    class Plain(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match=r"Plain has no new_cache\(batch_size, capacity\): pass use_cache=False"):
        generate(Plain(), torch.tensor([[0]]), 1)


def test_prompts_are_padded_at_the_left():
    tokens, mask = left_pad([[1, 2, 3], [4]], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.int().tolist() == [[1, 1, 1], [0, 0, 1]]


# --- one function a step, so that a mistake can be put into one alone


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("last_position", lambda logits: logits[:, 0]),
        ("apply_temperature", lambda logits, temperature: logits * temperature),
        ("top_k_filter", lambda logits, k: logits),
        ("top_p_filter", lambda logits, p: logits),
        ("sample", lambda logits, generator: logits.argmin(-1)),
        ("greedy", lambda logits: logits.argmin(-1)),
        ("finish", lambda new, finished, end, pad: (new, finished)),
        ("crop", lambda x, limit: x[:, :limit]),
    ],
)
def test_each_step_is_one_function_that_decoding_goes_through(name, damaged, monkeypatch):
    model = amplified(gpt2(**SIZES), 0)
    prompt = torch.tensor(random_prompts([3, 3]))

    def everything() -> list[torch.Tensor]:
        seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return [
            generate(model, prompt, 12),
            generate(model, prompt, 12, end=int(generate(model, prompt, 4)[0, 3])),
            generate(model, prompt, 12, temperature=1.5, generator=seeded[0]),
            generate(model, prompt, 12, temperature=1.5, generator=seeded[1], top_k=2),
            generate(model, prompt, 12, temperature=1.5, generator=seeded[2], top_p=0.3),
        ]

    right = everything()
    monkeypatch.setattr(generation, name, damaged)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(right, everything(), strict=True))
