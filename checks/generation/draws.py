"""How a generate samples: the weights that reach torch.multinomial (or counts of tokens), and what they should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..watch.draws import seeded
from .scripted import Stage, dealt

LEVEL = 1e-4  # of a χ² test; a rejection is tested a second time, so a correct sampler fails once in 1e8
DISTINCT = 16  # tokens that share nearly all of the probability
RATIOS = (0.9, 0.8)  # of a token's probability to that of the next likelier one, from the first row to the last
DRAWS = 768


def scores(V: int, B: int, *, seed: int) -> Tensor:
    """Log-probabilities [B, V]: rows differ in the order and in the slope, and no two values of a row are equal.

    Up to 16 tokens share nearly all of the probability: the likeliest has about 0.16, each next one 0.8 to 0.9 times
    the one before.
    """
    rank = torch.arange(V, dtype=torch.float64)
    ratio = torch.linspace(*RATIOS, B, dtype=torch.float64) if B > 1 else torch.tensor([sum(RATIOS) / 2])
    logits = rank * ratio[:, None].log().double()
    logits[:, DISTINCT:] -= 12
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(V, generator=generator) for _ in range(B)])
    return logits.log_softmax(-1).gather(-1, order)


class Caught(TorchFunctionMode):
    """Records the weights passed to torch.multinomial, and can force which index of a row is drawn."""

    def __init__(self, forced: int | None = None) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.forced = forced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        if func in (torch.multinomial, torch.Tensor.multinomial):
            weights = args[0] if args else (kwargs or {})["input"]
            self.weights.append(weights.detach().double().reshape(-1, weights.shape[-1]))
            if self.forced is not None and self.forced < weights.shape[-1]:
                possible = weights[..., self.forced : self.forced + 1] > 0
                drawn = torch.where(possible.expand_as(drawn), self.forced, drawn)
        return drawn


@dataclass
class Sampler:
    """A stage whose model always returns the logits `given` [B, V], and how its generate samples from them."""

    on: Stage
    given: Tensor

    def __post_init__(self) -> None:
        self.given = self.given.index_fill(1, torch.tensor(self.on.banned, dtype=torch.long), -torch.inf)
        self.prompts = self.on.subject.tokens(len(self.given), 2, seed=self.on.subject.seed)

    def likeliest(self, temperature: float = 1.0) -> Tensor:
        """The right probabilities [B, V] at a temperature, sorted from the largest."""
        return (self.given / temperature).softmax(dim=-1).sort(dim=-1, descending=True).values

    def kept(self, options: dict[str, Any]) -> Tensor | None:
        """The sorted probabilities [B, V] from which each row's token is drawn; None if multinomial is not called."""
        caught = self.catch(None, **options)[0]
        if len(caught) != len(self.given):
            return None
        padded = torch.zeros_like(self.given)
        padded[:, : caught.shape[1]] = caught[:, : padded.shape[1]]
        return (padded / padded.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True).values

    def catch(self, forced: int | None, **options: Any) -> tuple[Tensor, Tensor]:
        """The weights [B, K] that multinomial was given for one draw per row, and the tokens [B] that came out."""
        self.on.script = dealt(self.given)
        with seeded(self.on.subject.seed), Caught(forced) as caught:
            tokens = self.on.generate(self.prompts, 1, **options)
        same = {weights.shape[-1] for weights in caught.weights}
        weights = torch.cat(caught.weights) if len(same) == 1 else torch.empty(0, 0)
        return weights, torch.tensor([row[0] for row in tokens])

    def counts(self, options: dict[str, Any], *, draw: int = 0) -> Tensor:
        """How often each token [V] came out in about 768 draws from the first row's probabilities."""
        self.on.script = dealt(self.given[:1])
        rows, n = 64 if self.on.decoder.batched else 8, max(1, min(self.on.block_size, 24) - 2)
        prompts, V = self.on.subject.tokens(rows, 2), self.given.shape[1]
        counts = torch.zeros(V, dtype=torch.long)
        for call in range(-(-DRAWS // (rows * n))):
            with seeded(self.on.subject.seed + 1000 * draw + call):
                tokens = self.on.generate(prompts, n, **options)
            counts += torch.tensor(tokens).flatten().clamp(0, V - 1).bincount(minlength=V)
        return counts

    def first_row(self, kept: int, temperature: float = 1.0) -> Tensor:
        """The right probabilities [V] of the first row if its `kept` likeliest tokens are kept."""
        p = (self.given[0] / temperature).softmax(0)
        order = p.argsort(descending=True)
        return torch.zeros_like(p).index_copy(0, order[:kept], p[order[:kept]] / p[order[:kept]].sum())


def renormalized(whole: Tensor, size: Tensor) -> Tensor:
    """The first `size` [B] of each row of sorted probabilities [B, V], scaled to sum to 1."""
    cut = torch.where(torch.arange(whole.shape[1]) < size[:, None], whole, 0.0)
    return cut / cut.sum(dim=-1, keepdim=True)


def nucleus(whole: Tensor, p: float) -> Tensor:
    """How many of the likeliest tokens [B] are needed to reach p."""
    return ((whole.cumsum(dim=-1) < p - 1e-9).sum(dim=-1) + 1).clamp(max=whole.shape[1])


def apart(whole: Tensor, p: float) -> float:
    """The value near p that is farthest from every cumulative probability, so that rounding decides nothing."""
    sums = torch.cat((torch.zeros(len(whole), 1, dtype=whole.dtype), whole.cumsum(dim=-1)), dim=-1).flatten()
    near = torch.linspace(p - 0.05, p + 0.05, 101, dtype=whole.dtype)
    return round(float(near[(near[:, None] - sums).abs().amin(dim=-1).argmax()]), 4)


def unlikely(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of Pearson's χ² test of the counts against the probabilities; 0 for an impossible token.

    Cells with fewer than 5 expected draws are merged into one.
    """
    possible = probabilities > 0
    if bool(counts[~possible].any()):
        return 0.0
    expected, found = probabilities * counts.sum(), counts.double()
    rare = possible & (expected < 5)
    cells = torch.stack((expected[possible & ~rare], found[possible & ~rare]))
    if float(expected[rare].sum()) >= 5:
        cells = torch.cat((cells, torch.stack((expected[rare].sum(), found[rare].sum()))[:, None]), dim=1)
    if cells.shape[1] < 2:
        return 1.0
    statistic = ((cells[1] - cells[0]) ** 2 / cells[0]).sum()
    return float(torch.special.gammaincc(torch.tensor((cells.shape[1] - 1) / 2, dtype=torch.float64), statistic / 2))
