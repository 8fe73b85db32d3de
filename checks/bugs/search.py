"""Wrong penalties, beam searches and further functions that generate: the reference has none of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...transformer.model import KeyValueCache
from ..check_decoding import (
    check_a_penalty_makes_no_used_token_likelier,
    check_beam_length_is_that_of_the_new_tokens,
    check_beam_search_finds_the_likeliest,
    check_further_functions_follow_the_model,
)
from ..reference import reference_parts
from . import bug, toolbox
from .toolbox import parts_with_companions

# -- a penalty on tokens already used (Keskar et al. 2019)


def penalized(used: Tensor, penalty: float) -> Tensor:
    return torch.where(used > 0, used / penalty, used * penalty)


def penalizing(rule: Callable[[Tensor, float], Tensor] = penalized, **config: Any) -> SimpleNamespace:
    """The reference with a loop of its own, in which the logits of tokens already used are changed by a rule."""
    parts = reference_parts(**config)

    @torch.no_grad()
    def generate(
        model: Any, idx: Tensor, max_new_tokens: int, do_sample: bool = False, repetition_penalty: float = 1.0
    ) -> Tensor:
        for _ in range(max_new_tokens):
            logits = model(idx[:, -model.config.block_size :])[:, -1]
            logits = logits.scatter(1, idx, rule(logits.gather(1, idx), repetition_penalty))
            odds = logits.softmax(-1)
            new = torch.multinomial(odds, 1) if do_sample else odds.argmax(-1, keepdim=True)
            idx = torch.cat((idx, new), dim=1)
        return idx

    parts.generate = generate
    return parts


@bug(
    "the repetition penalty divides negative logits too: used tokens become likelier",
    check_a_penalty_makes_no_used_token_likelier,
    of=penalizing,
)
def penalty_divides_negative_logits(parts: SimpleNamespace) -> None:
    parts.generate = penalizing(lambda used, penalty: used / penalty).generate


@bug("the repetition penalty is accepted and never used", check_a_penalty_makes_no_used_token_likelier, of=penalizing)
def penalty_ignored(parts: SimpleNamespace) -> None:
    parts.generate = penalizing(lambda used, penalty: used).generate


# -- beam search over the reference's cache


def follow(cache: KeyValueCache, beam: Tensor) -> None:
    """Reorders a cache by the beam that each text came from."""
    cache.keys, cache.values = cache.keys[:, beam], cache.values[:, beam]


def searching(
    follow: Callable[[KeyValueCache, Tensor], None] = follow,
    others: float = -torch.inf,
    counted: Callable[[int, int], int] = lambda prompt, new: new,
    **config: Any,
) -> SimpleNamespace:
    """The reference with a beam search: `others` is what all beams but the first start with, `counted` gives the length
    of a beam from those of its prompt and its new tokens.
    """
    parts = reference_parts(**config)

    def search(model: Any, prompt: Tensor, n: int, beams: int, end: int | None) -> Tensor:
        T = len(prompt)
        ids, cache = prompt.repeat(beams, 1), model.new_cache(beams, T + n)
        scores = torch.full((beams,), others, dtype=torch.float64)
        scores[0], done = 0.0, []
        logits = model(ids, cache=cache)
        for step in range(1, n + 1):
            total = scores[:, None] + logits[:, -1].double().log_softmax(-1)
            if end is not None:
                done += [(float(total[b, end]) / counted(T, step), ids[b]) for b in range(beams)]
                total[:, end] = -torch.inf
            scores, chosen = total.flatten().topk(beams)
            beam, token = chosen // total.shape[1], chosen % total.shape[1]
            ids = torch.cat((ids[beam], token[:, None]), dim=1)
            if step < n:
                follow(cache, beam)
                logits = model(ids[:, -1:], cache=cache)
        done += [(float(score) / counted(T, n), text) for score, text in zip(scores, ids, strict=True)]
        return max(done, key=lambda beam: beam[0])[1]

    @torch.no_grad()
    def generate(
        model: nn.Module, idx: Tensor, max_new_tokens: int, num_beams: int = 1, eos_token_id: int | None = None
    ) -> Tensor:
        longest = idx.shape[1] + max_new_tokens
        texts = [search(model, prompt, max_new_tokens, num_beams, eos_token_id) for prompt in idx]
        fill = 0 if eos_token_id is None else eos_token_id
        return torch.stack([torch.cat((text, text.new_full((longest - len(text),), fill))) for text in texts])

    parts.generate = generate
    return parts


@bug(
    "beam search does not reorder its cache when beams change places",
    check_beam_search_finds_the_likeliest,
    of=searching,
)
def beams_keep_old_caches(parts: SimpleNamespace) -> None:
    parts.generate = searching(follow=lambda cache, beam: None).generate


@bug(
    "all beams start alike: the search finds one text, several times",
    check_beam_search_finds_the_likeliest,
    of=searching,
)
def beams_all_alike(parts: SimpleNamespace) -> None:
    parts.generate = searching(others=0.0).generate


@bug(
    "the length by which a beam's score is divided counts the prompt",
    check_beam_length_is_that_of_the_new_tokens,
    of=searching,
)
def beam_length_counts_prompt(parts: SimpleNamespace) -> None:
    parts.generate = searching(counted=lambda prompt, new: prompt + new).generate


# -- a further function that generates


@bug(
    "a function that samples, beside generate, reads the logits of the first position",
    check_further_functions_follow_the_model,
    of=parts_with_companions,
)
def further_sampler_reads_the_first_position(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def sample_text(model: nn.Module, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        return toolbox.continued(model, idx, max_new_tokens, temperature, read=0)

    toolbox.replace(parts, "generation", sample_text)


@bug(
    "a function that samples, beside generate, adds one token too few",
    check_further_functions_follow_the_model,
    of=parts_with_companions,
)
def further_sampler_stops_early(parts: SimpleNamespace) -> None:
    @torch.no_grad()
    def sample_text(model: nn.Module, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        return toolbox.continued(model, idx, max_new_tokens - 1, temperature, read=-1)

    toolbox.replace(parts, "generation", sample_text)
