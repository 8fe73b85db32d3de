"""What a declared architecture fixes for decoding: logits of the last position alone, and the draws of generate.

Draws are seen at torch.multinomial, and compared with the softmax of the reference's last logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...expect import NotApplicable
from ...generation.draws import Caught
from ...generation.met_generate import decoder
from ...watch.draws import seeded
from ..closeness import apart
from ..reference import build
from ..specimen import Fit, Specimen

# Arguments of public forwards that ask for the last position only, and what they are set to.
LAST_ONLY: dict[str, Any] = {
    "logits_to_keep": 1, "num_logits_to_keep": 1, "num_last_tokens": 1, "last_only": True, "only_last": True,
    "last_token_only": True, "return_last_only": True, "last_logits_only": True,
}  # fmt: skip
STEPS = 3  # tokens drawn per row
NEVER = 1e-8  # a smaller probability is not compared


# -- the last position


@dataclass(frozen=True)
class LastPosition:
    """One call that returns only the last position: how it is made, and its logits [B, V]."""

    how: str  # "forward(idx) without targets"
    tokens: Tensor
    logits: Tensor
    error: float  # difference from the reference's last position, relative to the largest logit

    def meant(self, everything: Tensor) -> str:
        """Which of all logits [B, T, V] these are, if not the last position's; "" if none."""
        known = {
            "position 0": everything[:, 0],
            "the last position but one": everything[:, -2],
            "the last row of the batch, for every row": everything[-1:, -1].expand_as(self.logits),
            "the first row of the batch, for every row": everything[:1, -1].expand_as(self.logits),
            "the mean over positions": everything.mean(1),
        }
        return next((says for says, logits in known.items() if apart(self.logits, logits) < 1e-6), "")


def last_positions(fit: Fit) -> list[LastPosition]:
    """Every such call, with all tokens and with five; none where the model always returns all positions."""
    specimen = fit.specimen
    whole, short = specimen.tokens, specimen.tokens[:, :5].contiguous()
    found = []
    for how, given in _calls(specimen):
        for tokens in (whole, short):
            logits = _answer(specimen, tokens, given)
            if logits is not None:
                right = fit.theirs[:, tokens.shape[1] - 1]
                found.append(LastPosition(how, tokens, logits, apart(logits, right)))
    return found


def _calls(specimen: Specimen) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        parameters = inspect.signature(specimen.model.forward).parameters
    except (TypeError, ValueError):
        return
    first = next(iter(parameters), "tokens")
    if specimen.subject.given_more:
        yield f"forward({first}) without targets", {}
    for name in LAST_ONLY.keys() & parameters.keys():
        yield f"forward({first}, {name}={LAST_ONLY[name]})", {name: LAST_ONLY[name]}


def _answer(specimen: Specimen, tokens: Tensor, given: dict[str, Any]) -> Tensor | None:
    """[B, V], or None where the call is refused or returns another number of positions."""
    try:
        with torch.no_grad(), specimen.running(), specimen.subject.running():
            output = specimen.model(tokens.clone(), **given)
    except Exception:  # a call that this model does not take
        return None
    B, V = tokens.shape[0], specimen.shape.vocab_size
    for leaf in tree_leaves(getattr(output, "logits", output)):
        if isinstance(leaf, Tensor) and leaf.shape[:-1] in ((B, 1), (B,)) and leaf.shape[-1] >= V:
            return leaf.reshape(B, -1).double()
    return None


# -- what generate draws from


@dataclass(frozen=True)
class Draw:
    """One draw: the probabilities it was made from, and those of the reference, the likeliest token first."""

    step: int
    row: int
    theirs: Tensor  # [K], of the tokens with a weight above 0
    ours: Tensor  # [K], of as many tokens
    power: float  # the subject's logits as a multiple of the reference's, by least squares: 1 / temperature
    error: float  # largest difference of log-probabilities, over tokens with a probability above NEVER
    error_of_power: float  # the same after correcting for the power

    @property
    def worst(self) -> int:
        """The rank, from 0, of the token whose probability differs most, among those that are compared."""
        difference = (self.theirs.log() - self.ours.log()).abs()
        return int(difference.where((self.theirs > NEVER) & (self.ours > NEVER), -1.0).argmax())


def draws(fit: Fit) -> list[Draw]:
    """The draws of a few steps at temperature 1 without top-k or top-p. Raises NotApplicable if they are not seen."""
    assert fit.plan is not None and fit.variant is not None
    specimen, V = fit.specimen, fit.theirs.shape[-1]
    prompts = specimen.tokens[:2, :3].contiguous()
    with torch.no_grad(), specimen.running():
        decode = decoder(specimen.subject, specimen.model, V)
        with seeded(specimen.subject.seed), Caught() as caught:
            new = torch.tensor(decode(specimen.model, prompts, STEPS, sample=True, temperature=1.0))
    rows = 2 if decode.batched else 1
    weights = [w for w in caught.weights if len(w) == rows]
    if len(weights) != STEPS * (2 // rows) or new.shape != (2, STEPS):
        raise NotApplicable(f"{decode.name} does not draw by torch.multinomial", seen=len(caught.weights))
    reference, found = build(fit.plan, fit.variant), []
    for step in range(STEPS):
        with torch.no_grad():
            ours = reference(torch.cat((prompts, new[:, :step]), dim=1))[:, -1, :V].double()
        for row in range(2):
            theirs = weights[step][row] if rows == 2 else weights[row * STEPS + step][0]
            found.append(_draw(step, row, theirs, ours[row]))
    return found


def _draw(step: int, row: int, weights: Tensor, logits: Tensor) -> Draw:
    kept = int((weights > 0).sum())
    theirs = (weights / weights.sum()).sort(descending=True).values[:kept]
    likeliest = logits.sort(descending=True).values[:kept]
    ours = likeliest.softmax(0)
    drawn = (theirs > NEVER) & (ours > NEVER)
    x, y = (v[drawn] - v[drawn].mean() for v in (likeliest, theirs.log()))
    power = float((x * y).sum() / x.square().sum()) if int(drawn.sum()) > 1 else 1.0
    far = [
        float((theirs[drawn].log() - right.log_softmax(0)[drawn]).abs().max())
        for right in (likeliest, likeliest * power)
    ]
    return Draw(step, row, theirs, ours, power, *far)
