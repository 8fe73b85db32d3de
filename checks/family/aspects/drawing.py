"""What a subject's generate draws its tokens from, caught at torch.multinomial, beside the reference's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...expect import NotApplicable
from ...generation.draws import Caught
from ...generation.met_generate import decoder
from ...watch.draws import seeded
from ..reference import build
from ..specimen import Settled

STEPS = 3  # tokens drawn a row
NEVER = 1e-8  # a probability below which nothing is read off a weight


@dataclass(frozen=True)
class Draw:
    """One draw: probabilities, the likeliest first, of what was handed over and of the reference's last logits."""

    step: int
    row: int
    theirs: Tensor  # [K], of the tokens with a weight above 0
    ours: Tensor  # [K], of as many tokens
    power: float  # their logits as a multiple of the reference's, by least squares: 1 / temperature
    error: float  # the largest difference of log-probabilities, of tokens that are ever drawn
    error_of_power: float  # the same, with the power allowed for


def draws(found: Settled) -> list[Draw]:
    """The draws of a few steps at temperature 1 without filters. Raises NotApplicable where they are not seen."""
    assert found.plan is not None and found.variant is not None
    seen, V = found.specimen, found.theirs.shape[-1]
    prompts = seen.tokens[:2, :3].contiguous()
    with torch.no_grad(), seen.running():
        decode = decoder(seen.subject, seen.model, V)
        with seeded(seen.subject.seed), Caught() as caught:
            said = torch.tensor(decode(seen.model, prompts, STEPS, sample=True, temperature=1.0))
    rows = 2 if decode.batched else 1
    weights = [w for w in caught.weights if len(w) == rows]
    if len(weights) != STEPS * (2 // rows) or said.shape != (2, STEPS):
        raise NotApplicable(f"the draws of {decode.name} are not seen at torch.multinomial", seen=len(caught.weights))
    reference, found_draws = build(found.plan, found.variant), []
    for step in range(STEPS):
        with torch.no_grad():
            ours = reference(torch.cat((prompts, said[:, :step]), dim=1))[:, -1, :V].double()
        for row in range(2):
            theirs = weights[step][row] if rows == 2 else weights[row * STEPS + step][0]
            found_draws.append(_draw(step, row, theirs, ours[row]))
    return found_draws


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
