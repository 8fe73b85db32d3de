"""Correct decoding loops as people write them: they must not fail any check.

`LOOPS` maps a name to a generate for the reference's model, `LIBRARIES` a name to a library model with its generate.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.controls import CONTROLS, Called
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.subject import Subject

LOOPS: dict[str, Callable] = {}
LIBRARIES: dict[str, Callable[..., Subject]] = {}


def loop(function: Callable) -> Callable:
    LOOPS[function.__name__] = function
    return function


def loop_subject(name: str, *, seed: int = 0) -> Subject:
    parts = SimpleNamespace(build_model=reference_parts().build_model, generate=LOOPS[name])
    return Subject(name, parts, seed=seed)


# -- over the reference's model


@loop
@torch.no_grad()
def crops_and_draws(model, idx, max_new_tokens, temperature=1.0, do_sample=False, top_k=None):
    """Top-k by a threshold; greedy unless do_sample is set."""
    for _ in range(max_new_tokens):
        window = idx if idx.size(1) <= model.config.block_size else idx[:, -model.config.block_size :]
        logits = model(window)[:, -1, :] / temperature
        if top_k is not None:
            least, _ = torch.topk(logits, top_k)
            logits[logits < least[:, [-1]]] = -float("Inf")
        probs = F.softmax(logits, dim=-1)
        following = torch.multinomial(probs, 1) if do_sample else torch.topk(probs, k=1, dim=-1)[1]
        idx = torch.cat((idx, following), dim=1)
    return idx


@loop
def with_context_size(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=-1):
    """From a book, for one row: temperature 0 is greedy, torch.where cuts, an end token stops."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1, :]
        if top_k is not None:
            smallest = torch.topk(logits, top_k)[0][:, -1:]
            logits = torch.where(logits < smallest, torch.tensor(float("-inf")).to(logits), logits)
        if temperature > 0.0:
            following = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        else:
            following = torch.argmax(logits, dim=-1, keepdim=True)
        if following == eos_id:
            break
        idx = torch.cat((idx, following), dim=1)
    return idx


@loop
@torch.inference_mode()
def over_a_cache(model, prompt_ids: Tensor, max_new_tokens: int, use_cache: bool = True):
    """Prefill, then one token at a time; without the cache once the block is full."""
    text, cache = prompt_ids, None
    for _ in range(max_new_tokens):
        if not use_cache or text.shape[1] > model.config.block_size:
            logits = model(text[:, -model.config.block_size :])
        elif cache is None:
            cache = model.new_cache(len(text), model.config.block_size)
            logits = model(text, cache=cache)
        else:
            logits = model(text[:, -1:], cache=cache)
        text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
    return text


@loop
@torch.no_grad()
def left_padded(model, input_ids, attention_mask, max_new_tokens, eos_token_id=None, pad_token_id=0):
    """The mask is passed to every call and grows; rows that have ended are filled with the pad token."""
    ended = torch.zeros(len(input_ids), 1, dtype=torch.bool)
    for _ in range(max_new_tokens):
        size = model.config.block_size
        logits = model(input_ids[:, -size:], mask=attention_mask[:, -size:].bool())[:, -1]
        following = logits.argmax(-1, keepdim=True).masked_fill(ended, pad_token_id)
        input_ids = torch.cat((input_ids, following), 1)
        attention_mask = torch.cat((attention_mask, torch.ones_like(attention_mask[:, :1])), 1)
        if eos_token_id is not None:
            ended |= following == eos_token_id
            if ended.all():
                break
    return input_ids


@loop
def nucleus(model, tokens, n, p=0.9, temp=1.0, generator=None):
    """Top-p by a shifted mask over the sorted probabilities; in eval mode, then in the mode before."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(n):
            probs = (model(tokens[:, -model.config.block_size :])[:, -1] / temp).softmax(-1)
            ordered, index = probs.sort(-1, descending=True)
            cut = ordered.cumsum(-1) > p
            cut[:, 1:], cut[:, 0] = cut[:, :-1].clone(), False
            ordered[cut] = 0.0
            place = torch.multinomial(ordered / ordered.sum(-1, keepdim=True), 1, generator=generator)
            tokens = torch.cat((tokens, index.gather(-1, place)), 1)
    model.train(mode)
    return tokens


@loop
@torch.no_grad()
def one_row_of_k_likeliest(model, x, steps, temperature=1.0, k=None):
    """One row at a time: an index among the k likeliest is drawn, then looked up."""
    ids = x[0].tolist()
    for _ in range(steps):
        read = torch.tensor([ids[-model.config.block_size :]])
        scores, index = (model(read)[0, -1] / temperature).topk(k or model.config.vocab_size)
        ids.append(int(index[torch.multinomial(scores.softmax(0), 1)]))
    return torch.tensor([ids])


@loop
@torch.no_grad()
def by_categorical(model, context, max_new_tokens, temperature=1.0):
    """The sampler of torch.distributions."""
    for _ in range(max_new_tokens):
        logits = model(context[:, -model.config.block_size :])[:, -1] / temperature
        context = torch.cat((context, torch.distributions.Categorical(logits=logits).sample()[:, None]), 1)
    return context


@loop
@torch.no_grad()
def yields_tokens(model, ids, max_new_tokens):
    """A generator: one token of every row at a time."""
    for _ in range(max_new_tokens):
        following = model(ids[:, -model.config.block_size :])[:, -1].argmax(-1, keepdim=True)
        yield following
        ids = torch.cat((ids, following), 1)


@loop
@torch.no_grad()
def into_a_buffer(model, prompt, max_new_tokens, seed=None):
    """The output is written into a preallocated tensor; a seed creates a separate generator."""
    B, T = prompt.shape
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    text = prompt.new_zeros(B, T + max_new_tokens)
    text[:, :T] = prompt
    for t in range(T, T + max_new_tokens):
        probs = model(text[:, max(0, t - model.config.block_size) : t])[:, -1].softmax(-1)
        text[:, t] = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return text


@loop
@torch.no_grad()
def bans_a_token(model, prompt, max_new_tokens, temperature=1.0):
    """Never generates id 0, its begin token."""
    for _ in range(max_new_tokens):
        logits = model(prompt[:, -model.config.block_size :])[:, -1].index_fill(1, torch.tensor([0]), -torch.inf)
        prompt = torch.cat((prompt, torch.multinomial((logits / temperature).softmax(-1), 1)), 1)
    return prompt


# -- libraries, through the few lines that a user writes


class WithCache(Called):
    """A model of the transformers library that returns its cache as past_key_values."""

    def logits(self, model: nn.Module, tokens: Tensor, mask: Tensor | None = None, cache: Any = None, **more: Any):
        if cache is None:
            return super().logits(model, tokens, mask)
        before = cache.get("mask", tokens.new_ones(len(tokens), cache.get("length", 0)).bool())
        new = tokens.new_ones(tokens.shape).bool() if mask is None else mask.bool()
        cache["mask"], cache["length"] = torch.cat((before, new), 1), before.shape[1] + tokens.shape[1]
        given: dict[str, Any] = {"attention_mask": cache["mask"].long()}
        if "position_ids" in inspect.signature(model.forward).parameters:
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        answer = model(tokens, past_key_values=cache.get("past"), use_cache=True, **given)
        cache["past"] = answer.past_key_values
        return answer.logits

    def new_cache(self, model: nn.Module, batch_size: int) -> Any:
        return {}


def of_transformers(name: str, generate: Callable | None, *, seed: int = 0) -> Subject:
    known = CONTROLS[name](seed=seed)
    assert isinstance(known, Called)
    subject = WithCache(f"{name} with its cache", known.parts.build_model, known.call, mask=True, seed=seed)
    if generate is not None:
        subject.parts.generate = generate
    return subject


def greedy_of_the_library(model, prompt, max_new_tokens, mask=None):
    given = torch.ones_like(prompt) if mask is None else mask.long()
    return model.generate(prompt, attention_mask=given, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)


def samples_of_the_library(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0):
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=True, pad_token_id=0,
        temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip


for family in ("gpt2", "llama", "gpt-neox", "qwen2"):
    LIBRARIES[f"{family}, its own generate"] = functools.partial(of_transformers, family, None)
for family in ("gpt2", "llama"):
    LIBRARIES[f"{family}, greedy"] = functools.partial(of_transformers, family, greedy_of_the_library)
    LIBRARIES[f"{family}, samples"] = functools.partial(of_transformers, family, samples_of_the_library)


def x_wrapper(model, prompt, max_new_tokens, temperature=1.0):
    """x-transformers' own loop around its own model."""
    from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

    return (
        AutoregressiveWrapper(model)
        .train(model.training)
        .generate(prompt, max_new_tokens, temperature=temperature, filter_logits_fn=lambda logits: logits)
    )


def of_x_transformers(name: str, *, seed: int = 0) -> Subject:
    subject = CONTROLS[name](seed=seed)
    subject.parts.generate = x_wrapper
    return subject


LIBRARIES["x-absolute, its wrapper"] = functools.partial(of_x_transformers, "x-absolute")
LIBRARIES["x-rotary, its wrapper"] = functools.partial(of_x_transformers, "x-rotary")
