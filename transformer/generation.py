"""Decoding: tokens appended one at a time, greedy or sampled, over a key-value cache or without one.

Each step (read, last position, temperature, filters, sample, end, crop) is one small function.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = Callable[..., Tensor]  # tokens [B, T], and mask= or cache= where they are used, to logits [B, T, V]

Module = TypeVar("Module", bound=nn.Module)


def generate(
    model: Model,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mask: Tensor | None = None,
    end: int | None = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """The prompt [B, T] followed by n ≤ `max_new_tokens` new tokens a row: [B, T + n].

    Temperature 0 is greedy. Otherwise tokens are drawn from the `top_k` likeliest, and among those from the likeliest
    that together reach probability `top_p` (Holtzman et al. 2019), by `generator`; without one, by a new one seeded
    from the system's entropy. The global random state, the model's mode and the prompt are left as they are.

    `mask` [B, T] is True for real tokens; shorter prompts stand at the right (see `left_pad`). A row that has produced
    `end` goes on with `pad`; when all have, n is smaller. Of more than the block size, the latest tokens are read.

    A model is called as model(tokens), model(tokens, mask=...) if a mask is given; with `use_cache`, it must have
    `new_cache(batch_size, capacity)`. Its block size is `model.config.block_size`; without that it has no limit.
    Raises ValueError for a value out of range, an empty prompt, and a mask that is not left padding.
    """
    refuse_bad_sampling(temperature, top_k, top_p)
    refuse_bad_prompt(prompt, mask, max_new_tokens)
    B, T = prompt.shape
    limit = block_size(model)
    tokens = torch.cat((prompt, prompt.new_full((B, max_new_tokens), pad)), dim=1)
    if mask is not None:
        mask = torch.cat((mask.bool(), mask.new_ones((B, max_new_tokens), dtype=torch.bool)), dim=1)
    if temperature > 0 and generator is None:
        generator = entropic_generator(prompt.device)
    cache = new_cache(model, B, min(T + max_new_tokens, limit)) if use_cache else None
    finished = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    with evaluating(model), without_gradients(use_cache):
        for t in range(T, T + max_new_tokens):
            logits = read(model, tokens[:, :t], None if mask is None else mask[:, :t], limit, cache)
            new = next_token(logits, temperature, top_k, top_p, generator)
            tokens[:, t], finished = finish(new, finished, end, pad)
            if end is not None and finished.all():
                tokens = tokens[:, : t + 1]
                break
    return tokens.clone()


def read(model: Model, tokens: Tensor, mask: Tensor | None, limit: int, cache: Any) -> Tensor:
    """Logits [B, V] for the token after `tokens` [B, T]; with a cache, only what it has not seen is computed.

    Past the block size every kept token has a new position and fewer predecessors: nothing cached holds any longer.
    """
    given = {}
    if tokens.shape[1] > limit:
        tokens, mask = crop(tokens, limit), None if mask is None else crop(mask, limit)
    elif cache is not None:
        unread = slice(cache.length, None)
        tokens, mask = tokens[:, unread], None if mask is None else mask[:, unread]
        given["cache"] = cache
    if mask is not None:
        given["mask"] = mask
    return last_position(model(tokens, **given))


def crop(x: Tensor, limit: int) -> Tensor:
    return x[:, -limit:]


def last_position(logits: Tensor) -> Tensor:
    return logits[:, -1]


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """The token chosen in each row [B] from its logits [B, V]."""
    if temperature == 0:
        return greedy(logits)
    logits = apply_temperature(logits.float(), temperature)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    return sample(logits, generator)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The largest becomes 0 first, so that a tiny temperature overflows to -∞ only, which has probability 0."""
    below = logits - logits.amax(dim=-1, keepdim=True)
    return below / max(temperature, torch.finfo(logits.dtype).tiny)


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """-∞ below each row's k-th largest; what ties with it stays."""
    threshold = logits.topk(min(k, logits.shape[-1])).values[..., -1:]  # [B, 1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """-∞ outside each row's smallest set of likeliest tokens whose probabilities reach p together."""
    if p == 1:
        return logits  # a sum in floating point can reach 1 before the last token
    likeliest, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = likeliest.softmax(dim=-1)
    reached_before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the likeliest, which therefore stays
    dropped = torch.empty_like(reached_before, dtype=torch.bool).scatter(-1, order, reached_before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def sample(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token a row [B], drawn where the generator lives: a CPU generator gives a GPU's model the CPU's tokens."""
    probabilities = logits.softmax(dim=-1)
    device = probabilities.device if generator is None else generator.device
    return torch.multinomial(probabilities.to(device), 1, generator=generator).squeeze(-1).to(logits.device)


def finish(new: Tensor, finished: Tensor, end: int | None, pad: int) -> tuple[Tensor, Tensor]:
    """The tokens to append [B], padding where the row had ended before, and which rows have ended now [B]."""
    if end is None:
        return new, finished
    return new.masked_fill(finished, pad), finished | (new == end)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside; outside, every submodule is in the mode it was found in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = [module.training for module in modules]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in zip(modules, found, strict=True):
            module.training = training


def without_gradients(use_cache: bool) -> AbstractContextManager[Any]:
    """Inference mode costs less per operation, but autograd refuses the tensors made in it.

    Without a cache any callable may be the model, also one that keeps tensors (rotary angles, say) for training.
    """
    return torch.inference_mode() if use_cache else torch.no_grad()


def for_decoding(model: Module) -> Module:
    """A copy of the model for decoding one or two rows on a CPU: in eval mode, with weights that are not trained.

    Its linear layers store their weights column by column, so that a product with a single vector is a quarter faster.
    A weight being trained must not be stored like that: PyTorch's fused optimizers mistake its order for that of its
    gradient or of averages that were saved row by row.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.t().contiguous().t(), requires_grad=False)
    return model


def new_cache(model: Model, batch_size: int, capacity: int) -> Any:
    if not hasattr(model, "new_cache"):
        raise ValueError(f"{type(model).__name__} has no new_cache(batch_size, capacity): pass use_cache=False")
    return model.new_cache(batch_size, capacity)


def block_size(model: Model) -> int:
    """The most tokens the model reads at once."""
    return getattr(getattr(model, "config", None), "block_size", sys.maxsize)


def entropic_generator(device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.seed()
    return generator


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of unequal lengths as tokens [B, T] and mask [B, T], each at the right, where its continuation begins."""
    T = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    return tokens, mask


def refuse_bad_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def refuse_bad_prompt(prompt: Tensor, mask: Tensor | None, max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if prompt.dim() != 2 or prompt.dtype != torch.long:
        raise ValueError(f"prompt must be [B, T] of torch.long, got {list(prompt.shape)} of {prompt.dtype}")
    if prompt.shape[1] == 0:
        raise ValueError("prompt must have at least one token a row (the begin token, for instance), got none")
    if mask is not None:
        refuse_bad_mask(prompt, mask.bool())


def refuse_bad_mask(prompt: Tensor, mask: Tensor) -> None:
    if mask.shape != prompt.shape:
        raise ValueError(f"mask must have the prompt's shape {list(prompt.shape)}, got {list(mask.shape)}")
    left_padded = mask[:, -1] & (mask[:, 1:] >= mask[:, :-1]).all(dim=1)
    if not left_padded.all():
        row = int((~left_padded).int().argmax())
        raise ValueError(f"mask must be left padding, False then True: row {row} is {mask[row].int().tolist()}")
