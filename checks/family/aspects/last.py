"""What a model says of the last position alone: called without targets, or asked to keep one position's logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..agreement import apart
from ..specimen import Settled, Specimen

# Parameters of public forwards that ask for the last position only, and what they are given.
ASKED: dict[str, Any] = {
    "logits_to_keep": 1, "num_logits_to_keep": 1, "num_last_tokens": 1, "last_only": True, "only_last": True,
    "last_token_only": True, "return_last_only": True, "last_logits_only": True,
}  # fmt: skip


@dataclass(frozen=True)
class Last:
    """One call that answers for the last position: how it is made, and its logits [B, V]."""

    how: str  # "forward(idx) without targets"
    tokens: Tensor
    logits: Tensor
    error: float  # of the largest logit, from those of the last position in a call for all

    def meant(self, everything: Tensor) -> str:
        """Which logits of a call for all [B, T, V] these are, if not the last position's."""
        known = {
            "position 0": everything[:, 0],
            "the last position but one": everything[:, -2],
            "the last row of the batch, for every row": everything[-1:, -1].expand_as(self.logits),
            "the first row of the batch, for every row": everything[:1, -1].expand_as(self.logits),
            "the mean over positions": everything.mean(1),
        }
        return next((says for says, logits in known.items() if apart(self.logits, logits) < 1e-6), "")


def last_positions(found: Settled) -> list[Last]:
    """Every such call, of all tokens and of five; none where the model always answers for all."""
    seen = found.specimen
    whole, short = seen.tokens, seen.tokens[:, :5].contiguous()
    done = []
    for how, given in _calls(seen):
        for tokens in (whole, short):
            logits = _answer(seen, tokens, given)
            if logits is not None:
                right = found.theirs[:, tokens.shape[1] - 1]
                done.append(Last(how, tokens, logits, apart(logits, right)))
    return done


def _calls(seen: Specimen) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        parameters = inspect.signature(seen.model.forward).parameters
    except (TypeError, ValueError):
        return
    first = next(iter(parameters), "tokens")
    if seen.subject.given_more:
        yield f"forward({first}) without targets", {}
    for name in ASKED.keys() & parameters.keys():
        yield f"forward({first}, {name}={ASKED[name]})", {name: ASKED[name]}


def _answer(seen: Specimen, tokens: Tensor, given: dict[str, Any]) -> Tensor | None:
    """[B, V], or None where the call is refused or answers for another number of positions."""
    try:
        with torch.no_grad(), seen.running(), seen.subject.running():
            output = seen.model(tokens.clone(), **given)
    except Exception:  # a call that this model does not take
        return None
    B, V = tokens.shape[0], seen.shape.vocab_size
    for leaf in tree_leaves(getattr(output, "logits", output)):
        if isinstance(leaf, Tensor) and leaf.shape[:-1] in ((B, 1), (B,)) and leaf.shape[-1] >= V:
            return leaf.reshape(B, -1).double()
    return None
