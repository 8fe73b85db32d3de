"""The right answer of a beam search: the same search, in which every text is read whole and none through a cache."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..expect import NotApplicable
from .calls import Script
from .scripted import Stage

FIRST, END = 1, 2  # the prompt's token and the end token of `chain`
FLAT = 0.5  # standard deviation of logits
NEVER = -60.0  # nats of a token that the chain does not take


def flat(on: Stage) -> Script:
    """The model's own logits, scaled to a small deviation: no next token is far ahead, so beams change places often."""
    deviation = float(on.ask(on.subject.tokens(8, 3, seed=on.subject.seed)).double().std()) or 1.0

    def script(logits: Tensor, tokens: Tensor | None) -> Tensor:
        return logits * (FLAT / deviation)

    return script


def best(on: Stage, prompts: Tensor, n: int, beams: int) -> Tensor:
    """The likeliest text [B, n] that a search with `beams` beams finds after each prompt [B, T]."""
    return torch.cat([_search(on, prompt, n, beams) for prompt in prompts])


def _search(on: Stage, prompt: Tensor, n: int, beams: int) -> Tensor:
    texts, scores = prompt[None], torch.zeros(1, dtype=torch.float64, device=prompt.device)
    for _ in range(n):
        total = (scores[:, None] + _next(on, texts)).flatten()
        scores, chosen = total.topk(min(beams, len(total)))
        beam, token = chosen // on.vocab_size, chosen % on.vocab_size
        texts = torch.cat((texts[beam], token[:, None]), dim=1)
    return texts[scores.argmax()][None, len(prompt) :]


def log_probability(on: Stage, prompts: Tensor, new: Tensor) -> Tensor:
    """How likely the new tokens [B, n] are after their prompts [B, T], in nats [B]."""
    text, total = torch.cat((prompts, new), dim=1), torch.zeros(len(new), dtype=torch.float64, device=new.device)
    for at in range(prompts.shape[1], text.shape[1]):
        total += _next(on, text[:, :at]).gather(1, text[:, at : at + 1])[:, 0]
    return total


def _next(on: Stage, texts: Tensor) -> Tensor:
    """Log-probabilities [B, V] of the token after each text."""
    return on.script(on.ask(texts[:, -on.block_size :]), None).double().log_softmax(-1)


def chain(V: int, end: float, n: int) -> Script:
    """A model that looks at the latest token only: after FIRST it ends with this probability, or goes on for n tokens.

    Going on is as likely as ending to the power 1.6: divided by the number of new tokens it wins, divided by lengths
    that count a long prompt it loses.
    """
    if V < n + 4:
        raise NotApplicable(f"a vocabulary of {V} is too small for this check")
    path = [FIRST, *range(END + 1, END + 1 + n)]
    table = torch.full((V, V), NEVER, dtype=torch.float64)
    table[:, END] *= 2
    others = [token for token in range(V) if token not in (*path, END)]
    table[FIRST, END], table[FIRST, path[1]] = torch.tensor([end, 1 - end], dtype=torch.float64).log()
    each = min(float((end**1.6 / (1 - end)) ** (1 / (n - 1))), 0.999)
    for one, following in pairwise(path[1:]):
        table[one, following] = math.log(each)
        table[one, others] = math.log((1 - each) / len(others))

    def script(logits: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            return logits
        read = tokens[..., tokens.shape[-1] - logits.shape[-2] :] if logits.dim() == 3 else tokens[..., -1]
        return table.to(logits)[read]

    return script
