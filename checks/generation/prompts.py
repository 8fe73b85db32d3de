"""Prompts for a generate: several as one padded batch, and some whose continuations contain an end token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..expect import NotApplicable
from .met_generate import Rows
from .scripted import Stage


def continued(on: Stage, alone: list[Tensor], side: str, n: int) -> Rows | None:
    """What generate gives for these prompts as one batch; None if it refuses padding on that side."""
    if on.decoder.form == "lists" and on.decoder.batched:
        return on.greedy([prompt.tolist()[0] for prompt in alone], n)
    on.decoder.wants("mask")
    if not on.decoder.batched:
        raise NotApplicable(f"{on.decoder.name} takes one prompt at a time")
    T = max(prompt.shape[1] for prompt in alone)
    tokens, mask = on.subject.tokens(len(alone), T, seed=on.subject.seed + 1), torch.zeros(len(alone), T)
    for row, prompt in enumerate(alone):
        real = slice(T - prompt.shape[1], T) if side == "left" else slice(0, prompt.shape[1])
        tokens[row, real], mask[row, real] = prompt[0], 1
    return first_accepted(on, tokens, mask.to(tokens.device), n)[0]


def first_accepted(on: Stage, tokens: Tensor, mask: Tensor, n: int) -> tuple[Rows | None, torch.dtype]:
    """What generate gives with a boolean or an integer mask, the first that raises no error, and which it was."""
    for dtype in (torch.long, torch.bool) if on.decoder.of_transformers else (torch.bool, torch.long):
        try:
            return on.greedy(tokens, n, mask=mask.to(dtype)), dtype
        except Exception:
            continue
    return None, torch.long


def with_an_end(on: Stage, n: int) -> tuple[Tensor, Rows, int]:
    """Two prompts, their continuations without an end token, and a token that only the first contains, early on."""
    for draw in range(20):
        T = max(1, min(3 + draw % 2, on.block_size - n))
        prompts = on.prompts(4 + draw, T, n)
        base = on.naive(prompts, n).tolist()
        for i, row in enumerate(base):
            rest, end = row[2:], row[1]
            others = [other for other in base if end not in other]
            if row[0] != end and others and len(set(rest)) > 1:
                chosen = [i, base.index(others[0])]
                return prompts[chosen], [base[j] for j in chosen], end
    raise NotApplicable("no token occurs in one generated row and not in another, so none can be the end token")


def ends_early(on: Stage) -> dict[str, int | tuple[int]]:
    """Options with which every row ends at its first new token; empty if generate takes no end token."""
    if "end" not in on.decoder.takes:
        return {}
    prompt = on.prompts(1, 3, 1)
    return {"end": on.decoder.end_value(int(on.naive(prompt, 1)[0, 0]))}
