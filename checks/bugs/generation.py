"""Mistakes in generate: each replaces one of the small functions of the reference's decoding, or wraps it wrongly."""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer import generation
from . import bug

APPENDS = "check_generation.check_generate_appends_tokens"
GREEDY = "check_generation.check_greedy_equals_the_naive_loop"
FITS = "check_generation.check_generate_reads_all_that_fits"
PADDED = "check_generation.check_padded_prompts_continue_as_alone"
END = "check_generation.check_end_token_ends_its_row"
LEAVES = "check_generation.check_generate_leaves_prompt_and_weights"
MODE = "check_generation.check_generate_restores_the_mode"
GRAPH = "check_generation.check_generate_keeps_no_graph"
RANDOM = "check_generation.check_generate_leaves_random_states"
TEMPERATURE = "check_sampling.check_temperature_divides_the_logits"
TOP_K = "check_sampling.check_top_k_keeps_k"
TOP_P = "check_sampling.check_top_p_keeps_the_nucleus"
TOGETHER = "check_sampling.check_filters_work_together"
ZERO = "check_sampling.check_temperature_zero_is_greedy"
SEEDS = "check_sampling.check_samples_differ_unless_seeded"


def decoding(**replaced: Callable) -> ModuleType:
    """The reference's decoding afresh, some of its functions replaced."""
    spec = importlib.util.spec_from_file_location("damaged_generation", generation.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(replaced)
    return module


def replace(parts: SimpleNamespace, **functions: Callable) -> None:
    parts.generate = decoding(**functions).generate


def wrapped(parts: SimpleNamespace, change: Callable[..., Tensor]) -> None:
    """`change(generate, model, prompt, max_new_tokens, **options)` in the place of generate."""

    @functools.wraps(generation.generate)
    def generate(model: nn.Module, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        return change(generation.generate, model, prompt, max_new_tokens, **options)

    parts.generate = generate


# -- what is read


@bug(
    "generate-first-position-logits",
    "the next token is taken from the logits of the first position read",
    caught_by=(GREEDY,),
)
def first_position(parts: SimpleNamespace) -> None:
    replace(parts, last_position=lambda logits: logits[:, 0])


@bug("generate-reads-earlier-position", "the next token is taken from the last position but one", caught_by=(GREEDY,))
def earlier_position(parts: SimpleNamespace) -> None:
    replace(parts, last_position=lambda logits: logits[:, max(-2, -logits.shape[1])])


@bug(
    "generate-drops-latest-token",
    "without a cache, each step reads the text without its latest token",
    caught_by=(GREEDY,),
)
def latest_token_not_read(parts: SimpleNamespace) -> None:
    def read(model, tokens, mask, limit, cache):
        return generation.read(model, tokens[:, : max(1, tokens.shape[1] - 1)], None, limit, None)

    replace(parts, read=read)


@bug("cache-refeeds-full-context", "the whole text is fed at each step, though the cache holds it", caught_by=(GREEDY,))
def full_context_fed_again(parts: SimpleNamespace) -> None:
    def read(model, tokens, mask, limit, cache):
        if cache is None or cache.length + tokens.shape[1] > min(limit, cache.capacity):
            return generation.read(model, tokens, mask, limit, None)
        return model(tokens, cache=cache)[:, -1]

    def roomy(model, batch_size, capacity):
        return generation.new_cache(model, batch_size, generation.block_size(model))

    replace(parts, read=read, new_cache=roomy)


@bug(
    "generate-no-context-crop",
    "past the block size the window does not slide: the first block is read for ever",
    caught_by=(FITS,),
    source="https://github.com/pzelasko/daseg/issues/11",
)
def window_does_not_slide(parts: SimpleNamespace) -> None:
    replace(parts, crop=lambda x, limit: x[:, :limit])


@bug("generate-crop-off-by-one", "the window is one token shorter than the block size", caught_by=(FITS,))
def window_too_short(parts: SimpleNamespace) -> None:
    replace(parts, block_size=lambda model: generation.block_size(model) - 1)


@bug(
    "generate-right-pad-last-logits",
    "padding stands on the right, and the next token is read at the last position all the same",
    caught_by=(PADDED,),
    source="https://github.com/huggingface/transformers/issues/14521 ; https://github.com/unslothai/unsloth/issues/772",
)
def last_position_of_right_padding(parts: SimpleNamespace) -> None:
    def read(model, tokens, mask, limit, cache):
        if mask is None:
            return generation.read(model, tokens, mask, limit, cache)
        order = mask.int().argsort(dim=1, descending=True, stable=True)  # the real tokens first
        return model(tokens.gather(1, order), mask=mask.gather(1, order))[:, -1]

    replace(parts, read=read)


@bug("generate-forgets-padding", "the padding mask of the prompts is not handed to the model", caught_by=(PADDED,))
def padding_not_handed_on(parts: SimpleNamespace) -> None:
    replace(parts, read=lambda model, tokens, mask, limit, cache: generation.read(model, tokens, None, limit, cache))


# -- which token is taken


def next_token(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    return generation.next_token(logits, temperature, top_k, top_p, generator)


@bug("same-token-for-whole-batch", "row 0's next token is given to every row", caught_by=(GREEDY, TOGETHER))
def token_of_row_0(parts: SimpleNamespace) -> None:
    replace(parts, next_token=lambda *given: next_token(*given)[:1].expand(given[0].shape[0]))


@bug("generate-keeps-its-cache", "the cache of the last call serves any text that is one token longer",
     caught_by=(GREEDY,))  # fmt: skip
def cache_of_the_last_call(parts: SimpleNamespace) -> None:
    kept: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()

    def keeping(generate: Callable, model: nn.Module, prompt: Tensor, n: int, **options: Any) -> Tensor:
        read = kept.get(model, prompt[:, :0])
        begun = torch.cat((read, prompt[:, -1:]), 1) if read.shape == prompt[:, :-1].shape else prompt
        text = generate(model, begun, n, **options)
        kept[model] = text[:, :-1]
        return torch.cat((prompt, text[:, prompt.shape[1] :]), dim=1)

    wrapped(parts, keeping)


@bug("argmax-over-another-axis", "the likeliest row of each token is taken for a token", caught_by=(GREEDY,))
def argmax_over_another_axis(parts: SimpleNamespace) -> None:
    replace(parts, next_token=lambda logits, *given: logits.argmax(dim=0)[torch.arange(len(logits)) % logits.shape[1]])


@bug("multinomial-of-other-weights", "tokens are drawn by the sigmoid of their logits", caught_by=(TEMPERATURE,))
def multinomial_of_other_weights(parts: SimpleNamespace) -> None:
    replace(parts, apply_temperature=lambda logits, temperature: (logits / temperature).sigmoid().log())


@bug("sampling-is-greedy", "the likeliest token is taken where sampling is asked for", caught_by=(TEMPERATURE,))
def sampling_is_greedy(parts: SimpleNamespace) -> None:
    replace(parts, next_token=lambda logits, *given: logits.argmax(dim=-1))


@bug("temperature-multiplied", "the logits are multiplied by the temperature", caught_by=(TEMPERATURE,))
def temperature_multiplied(parts: SimpleNamespace) -> None:
    replace(parts, apply_temperature=lambda logits, temperature: logits * temperature)


@bug("temperature-ignored", "the temperature is taken and not used", caught_by=(TEMPERATURE,))
def temperature_ignored(parts: SimpleNamespace) -> None:
    replace(parts, apply_temperature=lambda logits, temperature: logits)


@bug(
    "temperature-zero-division",
    "at temperature 0 the logits are divided by it before their maximum is taken",
    caught_by=(ZERO,),
    source="https://github.com/google-deepmind/gemma/pull/585 ; https://github.com/microsoft/onnxruntime-genai/pull/1211",
)
def divided_by_zero(parts: SimpleNamespace) -> None:
    replace(parts, greedy=lambda logits: (logits / 0.0).argmax(dim=-1))


@bug(
    "topk-off-by-one-more",
    "top-k keeps one token too many",
    caught_by=(TOP_K,),
    source="https://github.com/kingoflolz/mesh-transformer-jax/issues/164",
)
def one_more(parts: SimpleNamespace) -> None:
    replace(parts, top_k_filter=lambda logits, k: generation.top_k_filter(logits, k + 1))


@bug("topk-strict-inequality", "top-k drops the k-th token too", caught_by=(TOP_K,))
def one_less(parts: SimpleNamespace) -> None:
    def top_k_filter(logits, k):
        threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits <= threshold, -torch.inf)

    replace(parts, top_k_filter=top_k_filter)


@bug("topk-threshold-of-another-row", "the top-k thresholds [B] are compared along the vocabulary", caught_by=(TOP_K,))
def thresholds_along_the_vocabulary(parts: SimpleNamespace) -> None:
    def top_k_filter(logits, k):
        threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1]  # [B]: fits [B, V] where B is V or 1
        return logits.masked_fill(logits < threshold, -torch.inf)

    replace(parts, top_k_filter=top_k_filter)


@bug(
    "topp-drops-crossing-token",
    "top-p drops the token whose probability crosses p",
    caught_by=(TOP_P,),
    source="https://github.com/Biohub/esm/pull/360 ; https://github.com/rasbt/reasoning-from-scratch/issues/164",
)
def crossing_token_dropped(parts: SimpleNamespace) -> None:
    def top_p_filter(logits, p):
        likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
        dropped = likeliest.softmax(dim=-1).cumsum(dim=-1) > p
        dropped[..., 0] = False
        return logits.masked_fill(torch.empty_like(dropped).scatter(-1, order, dropped), -torch.inf)

    replace(parts, top_p_filter=top_p_filter)


@bug(
    "topp-mask-not-unsorted",
    "the top-p mask, made in sorted order, is applied to the unsorted logits",
    caught_by=(TOP_P,),
)
def mask_in_sorted_order(parts: SimpleNamespace) -> None:
    def top_p_filter(logits, p):
        probabilities = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
        return logits.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= p, -torch.inf)

    replace(parts, top_p_filter=top_p_filter)


@bug(
    "topp-threshold-inverted",
    "top-p keeps what reaches 1 - p",
    caught_by=(TOP_P,),
    source="https://github.com/lucidrains/x-transformers/issues/184",
)
def one_minus_p(parts: SimpleNamespace) -> None:
    replace(parts, top_p_filter=lambda logits, p: generation.top_p_filter(logits, max(1 - p, 1e-9)))


@bug(
    "topk-skips-topp",
    "top-p is ignored when top-k is given",
    caught_by=(TOGETHER,),
    source="https://github.com/shiyu-coder/Kronos/pull/262",
)
def top_p_skipped(parts: SimpleNamespace) -> None:
    def one_filter(logits, temperature, top_k, top_p, generator):
        return next_token(logits, temperature, top_k, None if top_k is not None else top_p, generator)

    replace(parts, next_token=one_filter)


@bug("topk-answers-a-place", "the place among the sorted tokens is taken for the token itself", caught_by=(TOGETHER,))
def place_taken_for_token(parts: SimpleNamespace) -> None:
    def sample(logits, generator):
        return generation.sample(logits.sort(dim=-1, descending=True).values, generator)

    replace(parts, sample=sample)


# -- length and end


@bug(
    "generate-length-off-by-one",
    "one token more than asked for",
    caught_by=(APPENDS,),
    source="https://github.com/EricLBuehler/mistral.rs/issues/1539",
)
def one_token_more(parts: SimpleNamespace) -> None:
    wrapped(parts, lambda generate, model, prompt, n, **options: generate(model, prompt, n + 1, **options))


@bug(
    "continues-after-eos",
    "a row that has ended goes on",
    caught_by=(END,),
    source="https://github.com/mistralai/mistral-inference/pull/270 ; https://github.com/lucidrains/h-transformer-1d/issues/9",
)
def goes_on_after_its_end(parts: SimpleNamespace) -> None:
    def finish(new, finished, end, pad):
        return new, finished if end is None else finished | (new == end)

    replace(parts, finish=finish)


@bug(
    "stops-when-any-row-eos",
    "the whole batch stops when one row has ended",
    caught_by=(END,),
    source="https://github.com/Lightning-AI/lit-llama/pull/153",
)
def all_stop_with_the_first(parts: SimpleNamespace) -> None:
    def finish(new, finished, end, pad):
        return new, finished if end is None else (finished | (new == end)).any().expand_as(finished)

    replace(parts, finish=finish)


@bug("end-token-ignored", "the end token is taken and not used", caught_by=(END,))
def end_ignored(parts: SimpleNamespace) -> None:
    replace(parts, finish=lambda new, finished, end, pad: (new, finished))


# -- what is left behind


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """The modes are restored, but inside it is the wrong one."""
    with generation.evaluating(model):
        model.train()
        yield


@bug(
    "generate-without-eval",
    "dropout is on while decoding, even for a model in eval mode",
    caught_by=(MODE,),
    source="https://github.com/jankrepl/mltype/issues/11 ; https://github.com/pytorch/examples/pull/114",
)
def decodes_in_train_mode(parts: SimpleNamespace) -> None:
    replace(parts, evaluating=training)


@contextmanager
def left_in_eval(model: nn.Module) -> Iterator[None]:
    model.eval()
    yield


@bug("generate-leaves-eval-mode", "the model stays in eval mode after a sample", caught_by=(MODE,))
def stays_in_eval_mode(parts: SimpleNamespace) -> None:
    replace(parts, evaluating=left_in_eval)


@bug("generate-mutates-prompt", "the prompt is the sliding window, written in place", caught_by=(LEAVES,))
def prompt_overwritten(parts: SimpleNamespace) -> None:
    def window(generate, model, prompt, n, **options):
        said = generate(model, prompt, n, **options)
        prompt.copy_(said[:, -prompt.shape[1] :])
        return said

    wrapped(parts, window)


@bug("generate-keeps-graph", "the cache keeps the autograd graph of every step", caught_by=(GRAPH,))
def graph_kept(parts: SimpleNamespace) -> None:
    parts.generate = decoding().generate.__wrapped__  # without torch.no_grad


# -- randomness


@bug(
    "seed-fixed-inside-generate",
    "tokens are drawn by a generator that is seeded the same way at each call",
    caught_by=(SEEDS,),
    source="https://github.com/kohya-ss/sd-scripts/pull/594 ; https://github.com/rohitg00/ai-engineering-from-scratch/pull/206",
)
def same_seed_always(parts: SimpleNamespace) -> None:
    replace(parts, entropic_generator=lambda device: torch.Generator(device).manual_seed(0))


@bug(
    "generate-reseeds-global-state",
    "the global generator is seeded at each call: training's dropout and order start again",
    caught_by=(RANDOM,),
    source="https://github.com/huggingface/diffusers/issues/7991 ; https://github.com/d8ahazard/sd_dreambooth_extension/pull/1060",
)
def global_state_rewound(parts: SimpleNamespace) -> None:
    def reseeded(device):
        torch.manual_seed(0)
        return generation.entropic_generator(device)

    replace(parts, entropic_generator=reseeded)


@bug("generator-ignored", "the caller's generator is taken, and tokens are drawn without it", caught_by=(SEEDS,))
def drawn_without_the_generator(parts: SimpleNamespace) -> None:
    def sample(logits, generator):
        return generation.sample(logits, generation.entropic_generator(logits.device))

    replace(parts, sample=sample)
