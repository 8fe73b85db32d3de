"""Wrong sampling: temperature, top-k, top-p, and the seed of the draws."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from ...transformer import generation
from ..check_sampling import (
    check_filters_work_together,
    check_samples_differ_unless_seeded,
    check_temperature_divides_the_logits,
    check_temperature_zero_is_greedy,
    check_top_k_keeps_k,
    check_top_p_keeps_the_nucleus,
)
from . import bug
from .damage import decode_with

# -- the distribution


@bug("tokens are drawn with the sigmoid of their logits instead of the softmax", check_temperature_divides_the_logits)
def multinomial_of_other_weights(parts: SimpleNamespace) -> None:
    decode_with(parts, apply_temperature=lambda logits, temperature: (logits / temperature).sigmoid().log())


@bug("the likeliest token is taken where sampling is asked for", check_temperature_divides_the_logits)
def sampling_is_greedy(parts: SimpleNamespace) -> None:
    decode_with(parts, next_token=lambda logits, *given: logits.argmax(dim=-1))


# -- temperature


@bug("logits are multiplied by the temperature instead of divided", check_temperature_divides_the_logits)
def temperature_multiplied(parts: SimpleNamespace) -> None:
    decode_with(parts, apply_temperature=lambda logits, temperature: logits * temperature)


@bug("the temperature is accepted and never used", check_temperature_divides_the_logits)
def temperature_ignored(parts: SimpleNamespace) -> None:
    decode_with(parts, apply_temperature=lambda logits, temperature: logits)


@bug(
    "at temperature 0 the logits are divided by 0 before the argmax",
    check_temperature_zero_is_greedy,
    source="https://github.com/google-deepmind/gemma/pull/585 ; "
    "https://github.com/microsoft/onnxruntime-genai/pull/1211",
)
def temperature_zero_division(parts: SimpleNamespace) -> None:
    decode_with(parts, greedy=lambda logits: (logits / 0.0).argmax(dim=-1))


# -- top-k


@bug(
    "top-k keeps k + 1 tokens",
    check_top_k_keeps_k,
    source="https://github.com/kingoflolz/mesh-transformer-jax/issues/164",
)
def topk_off_by_one_more(parts: SimpleNamespace) -> None:
    decode_with(parts, top_k_filter=lambda logits, k: generation.top_k_filter(logits, k + 1))


@bug("top-k drops the k-th token and keeps k - 1", check_top_k_keeps_k)
def topk_strict_inequality(parts: SimpleNamespace) -> None:
    def top_k_filter(logits: Tensor, k: int) -> Tensor:
        threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits <= threshold, -torch.inf)

    decode_with(parts, top_k_filter=top_k_filter)


@bug("top-k thresholds [B] are compared along the vocabulary instead of the batch", check_top_k_keeps_k)
def topk_threshold_of_another_row(parts: SimpleNamespace) -> None:
    def top_k_filter(logits: Tensor, k: int) -> Tensor:
        threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1]  # [B]: fits [B, V] where B is V or 1
        return logits.masked_fill(logits < threshold, -torch.inf)

    decode_with(parts, top_k_filter=top_k_filter)


@bug(
    "top-p is ignored when top-k is given",
    check_filters_work_together,
    source="https://github.com/shiyu-coder/Kronos/pull/262",
)
def topk_skips_topp(parts: SimpleNamespace) -> None:
    def one_filter(
        logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> Tensor:
        return generation.next_token(logits, temperature, top_k, None if top_k is not None else top_p, generator)

    decode_with(parts, next_token=one_filter)


@bug("the rank of the token is returned instead of its id", check_filters_work_together)
def topk_answers_a_place(parts: SimpleNamespace) -> None:
    def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return generation.sample(logits.sort(dim=-1, descending=True).values, generator)

    decode_with(parts, sample=sample)


# -- top-p


@bug(
    "top-p drops the token whose probability crosses p",
    check_top_p_keeps_the_nucleus,
    source="https://github.com/Biohub/esm/pull/360 ; https://github.com/rasbt/reasoning-from-scratch/issues/164",
)
def topp_drops_crossing_token(parts: SimpleNamespace) -> None:
    def top_p_filter(logits: Tensor, p: float) -> Tensor:
        likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
        dropped = likeliest.softmax(dim=-1).cumsum(dim=-1) > p
        dropped[..., 0] = False
        return logits.masked_fill(torch.empty_like(dropped).scatter(-1, order, dropped), -torch.inf)

    decode_with(parts, top_p_filter=top_p_filter)


@bug("the top-p mask is in sorted order and is applied to unsorted logits", check_top_p_keeps_the_nucleus)
def topp_mask_not_unsorted(parts: SimpleNamespace) -> None:
    def top_p_filter(logits: Tensor, p: float) -> Tensor:
        probabilities = logits.sort(dim=-1, descending=True).values.softmax(dim=-1)
        return logits.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= p, -torch.inf)

    decode_with(parts, top_p_filter=top_p_filter)


@bug(
    "top-p keeps 1 - p of the probability instead of p",
    check_top_p_keeps_the_nucleus,
    source="https://github.com/lucidrains/x-transformers/issues/184",
)
def topp_threshold_inverted(parts: SimpleNamespace) -> None:
    decode_with(parts, top_p_filter=lambda logits, p: generation.top_p_filter(logits, max(1 - p, 1e-9)))


@bug("in a batch top-p maps every row back by the order of row 0", check_top_p_keeps_the_nucleus)
def topp_order_of_row_zero(parts: SimpleNamespace) -> None:
    def top_p_filter(logits: Tensor, p: float) -> Tensor:
        likeliest, order = logits.sort(dim=-1, descending=True)
        probabilities = likeliest.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= p
        return logits.masked_fill(
            torch.empty_like(dropped).scatter(-1, order[:1].expand_as(order), dropped), -torch.inf
        )

    decode_with(parts, top_p_filter=top_p_filter)


@bug("what top-p rejects gets the logit 0, which rejects nothing", check_top_p_keeps_the_nucleus)
def rejected_logits_set_to_zero(parts: SimpleNamespace) -> None:
    def top_p_filter(logits: Tensor, p: float) -> Tensor:
        return generation.top_p_filter(logits, p).nan_to_num(neginf=0.0)

    decode_with(parts, top_p_filter=top_p_filter)


@bug("top-p measures the distribution before the temperature", check_filters_work_together)
def topp_before_temperature(parts: SimpleNamespace) -> None:
    def next_token(
        logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
    ) -> Tensor:
        if top_p is not None and temperature > 0:
            logits = generation.top_p_filter(logits.float(), top_p)
        return generation.next_token(logits, temperature, top_k, None, generator)

    decode_with(parts, next_token=next_token)


# -- the seed


@bug(
    "every call draws with the same seed: all samples are equal",
    check_samples_differ_unless_seeded,
    source="https://github.com/kohya-ss/sd-scripts/pull/594 ; "
    "https://github.com/rohitg00/ai-engineering-from-scratch/pull/206",
)
def seed_fixed_inside_generate(parts: SimpleNamespace) -> None:
    decode_with(parts, entropic_generator=lambda device: torch.Generator(device).manual_seed(0))


@bug("the caller's generator is accepted and never used", check_samples_differ_unless_seeded)
def generator_ignored(parts: SimpleNamespace) -> None:
    def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return generation.sample(logits, generation.entropic_generator(logits.device))

    decode_with(parts, sample=sample)
