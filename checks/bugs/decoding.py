"""Wrong decoding: which logits the next token is read from, when a row ends, and what generate leaves behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer import generation
from ...transformer.generation import Model
from ...transformer.model import KeyValueCache
from ..check_generation import (
    check_end_token_ends_its_row,
    check_generate_appends_tokens,
    check_generate_keeps_no_graph,
    check_generate_leaves_prompt_and_weights,
    check_generate_leaves_random_states,
    check_generate_reads_all_that_fits,
    check_generate_restores_the_mode,
    check_greedy_equals_the_naive_loop,
    check_padded_prompts_continue_as_alone,
)
from ..check_sampling import check_filters_work_together
from ..check_spec import check_generation_draws_from_the_logits
from . import bug
from .damage import GPT2, decode_with, generate_with

# -- what is read


@bug("the next token is read from the first position's logits instead of the last", check_greedy_equals_the_naive_loop)
def generate_first_position_logits(parts: SimpleNamespace) -> None:
    decode_with(parts, last_position=lambda logits: logits[:, 0])


@bug("the next token is read from the last position but one", check_greedy_equals_the_naive_loop)
def generate_reads_earlier_position(parts: SimpleNamespace) -> None:
    decode_with(parts, last_position=lambda logits: logits[:, max(-2, -logits.shape[1])])


@bug(
    "the next token is read from the last position, which is padding in a right-padded batch",
    check_padded_prompts_continue_as_alone,
    source="https://github.com/huggingface/transformers/issues/14521 ; https://github.com/unslothai/unsloth/issues/772",
)
def generate_right_pad_last_logits(parts: SimpleNamespace) -> None:
    def read(model: Model, tokens: Tensor, mask: Tensor | None, limit: int, cache: KeyValueCache | None) -> Tensor:
        if mask is None:
            return generation.read(model, tokens, mask, limit, cache)
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # the real tokens first
        return model(tokens.gather(1, order), mask=mask.gather(1, order))[:, -1]

    decode_with(parts, read=read)


@bug("the padding mask of the prompts is not passed to the model", check_padded_prompts_continue_as_alone)
def generate_forgets_padding(parts: SimpleNamespace) -> None:
    decode_with(
        parts, read=lambda model, tokens, mask, limit, cache: generation.read(model, tokens, None, limit, cache)
    )


@bug("without a cache, each step leaves out the latest token", check_greedy_equals_the_naive_loop)
def generate_drops_latest_token(parts: SimpleNamespace) -> None:
    def read(model: Model, tokens: Tensor, mask: Tensor | None, limit: int, cache: KeyValueCache | None) -> Tensor:
        return generation.read(model, tokens[:, : max(1, tokens.shape[1] - 1)], None, limit, None)

    decode_with(parts, read=read)


@bug(
    "the window does not slide past the block size: the first block is read for ever",
    check_generate_reads_all_that_fits,
    source="https://github.com/pzelasko/daseg/issues/11",
)
def generate_no_context_crop(parts: SimpleNamespace) -> None:
    decode_with(parts, crop=lambda x, limit: x[:, :limit])


@bug("the window is one token shorter than the block size", check_generate_reads_all_that_fits)
def generate_crop_off_by_one(parts: SimpleNamespace) -> None:
    decode_with(parts, block_size=lambda model: generation.block_size(model) - 1)


@bug("the whole text is fed at each step although the cache holds it", check_greedy_equals_the_naive_loop)
def cache_refeeds_full_context(parts: SimpleNamespace) -> None:
    def read(model: Model, tokens: Tensor, mask: Tensor | None, limit: int, cache: KeyValueCache | None) -> Tensor:
        if cache is None or cache.length + tokens.shape[1] > min(limit, cache.capacity):
            return generation.read(model, tokens, mask, limit, None)
        return model(tokens, cache=cache)[:, -1]

    def roomy(model: Model, batch_size: int, capacity: int) -> Any:
        return generation.new_cache(model, batch_size, generation.block_size(model))

    decode_with(parts, read=read, new_cache=roomy)


@bug("the cache of the last call is reused for any text that is one token longer", check_greedy_equals_the_naive_loop)
def generate_keeps_its_cache(parts: SimpleNamespace) -> None:
    kept: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()

    def keeping(generate: Callable[..., Tensor], model: nn.Module, prompt: Tensor, n: int, **options: Any) -> Tensor:
        read = kept.get(model, prompt[:, :0])
        begun = torch.cat((read, prompt[:, -1:]), 1) if read.shape == prompt[:, :-1].shape else prompt
        text = generate(model, begun, n, **options)
        kept[model] = text[:, :-1]
        return torch.cat((prompt, text[:, prompt.shape[1] :]), dim=1)

    generate_with(parts, keeping)


@bug("every row's next token is drawn from the last row's logits", check_generation_draws_from_the_logits, **GPT2)
def generation_of_the_last_row(parts: SimpleNamespace) -> None:
    decode_with(parts, last_position=lambda logits: logits[-1:, -1].expand(len(logits), -1))


# -- which token is appended


@bug("every row gets the next token of row 0", check_greedy_equals_the_naive_loop, check_filters_work_together)
def same_token_for_whole_batch(parts: SimpleNamespace) -> None:
    decode_with(
        parts, next_token=lambda logits, *given: generation.next_token(logits, *given)[:1].expand(logits.shape[0])
    )


@bug("the argmax runs over the batch instead of the vocabulary", check_greedy_equals_the_naive_loop)
def argmax_over_another_axis(parts: SimpleNamespace) -> None:
    decode_with(
        parts, next_token=lambda logits, *given: logits.argmax(dim=0)[torch.arange(len(logits)) % logits.shape[1]]
    )


# -- length and end


@bug(
    "one token too many is generated",
    check_generate_appends_tokens,
    source="https://github.com/EricLBuehler/mistral.rs/issues/1539",
)
def generate_length_off_by_one(parts: SimpleNamespace) -> None:
    generate_with(parts, lambda generate, model, prompt, n, **options: generate(model, prompt, n + 1, **options))


@bug(
    "a row goes on after its end token",
    check_end_token_ends_its_row,
    source="https://github.com/mistralai/mistral-inference/pull/270 ; "
    "https://github.com/lucidrains/h-transformer-1d/issues/9",
)
def continues_after_eos(parts: SimpleNamespace) -> None:
    def finish(new: Tensor, finished: Tensor, end: int | None, pad: int) -> tuple[Tensor, Tensor]:
        return new, finished if end is None else finished | (new == end)

    decode_with(parts, finish=finish)


@bug(
    "the whole batch stops when one row has ended",
    check_end_token_ends_its_row,
    source="https://github.com/Lightning-AI/lit-llama/pull/153",
)
def stops_when_any_row_eos(parts: SimpleNamespace) -> None:
    def finish(new: Tensor, finished: Tensor, end: int | None, pad: int) -> tuple[Tensor, Tensor]:
        return new, finished if end is None else (finished | (new == end)).any().expand_as(finished)

    decode_with(parts, finish=finish)


@bug("the end token is accepted and never used", check_end_token_ends_its_row)
def end_token_ignored(parts: SimpleNamespace) -> None:
    decode_with(parts, finish=lambda new, finished, end, pad: (new, finished))


# -- what is left behind


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The modes are restored, but inside it is the wrong one."""
    with generation.evaluating(model):
        model.train()
        yield


@bug(
    "decoding runs in training mode: dropout is on",
    check_generate_restores_the_mode,
    source="https://github.com/jankrepl/mltype/issues/11 ; https://github.com/pytorch/examples/pull/114",
)
def generate_without_eval(parts: SimpleNamespace) -> None:
    decode_with(parts, evaluating=training)


@contextmanager
def left_in_eval(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield


@bug("generate leaves the model in eval mode", check_generate_restores_the_mode)
def generate_leaves_eval_mode(parts: SimpleNamespace) -> None:
    decode_with(parts, evaluating=left_in_eval)


@bug("generate overwrites the prompt with its sliding window", check_generate_leaves_prompt_and_weights)
def generate_mutates_prompt(parts: SimpleNamespace) -> None:
    def window(generate: Callable[..., Tensor], model: nn.Module, prompt: Tensor, n: int, **options: Any) -> Tensor:
        said = generate(model, prompt, n, **options)
        prompt.copy_(said[:, -prompt.shape[1] :])
        return said

    generate_with(parts, window)


@bug("decoding runs without no_grad: the cache keeps the autograd graph of every step", check_generate_keeps_no_graph)
def generate_keeps_graph(parts: SimpleNamespace) -> None:
    decode_with(parts, without_gradients=lambda use_cache: nullcontext())


@bug(
    "generate seeds the global generator: training repeats its dropout and its order",
    check_generate_leaves_random_states,
    source="https://github.com/huggingface/diffusers/issues/7991 ; "
    "https://github.com/d8ahazard/sd_dreambooth_extension/pull/1060",
)
def generate_reseeds_global_state(parts: SimpleNamespace) -> None:
    def reseeded(device: torch.device) -> torch.Generator:
        torch.manual_seed(0)
        return generation.entropic_generator(device)

    decode_with(parts, entropic_generator=reseeded)
