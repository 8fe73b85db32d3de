"""How a generate draws its tokens: the weights that reach torch.multinomial, or counts where that is not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..watch.draws import seeded
from .scripted import Stage, dealt

LEVEL = 1e-4  # of a χ² test; a hit is drawn anew, so that a right sampler fails once in 1e8
DISTINCT = 16  # tokens of a probability that matters
RATIOS = (0.9, 0.8)  # of the probabilities of a token and the next likelier, from the first row to the last
DRAWS = 768


def scores(V: int, B: int, *, seed: int) -> Tensor:
    """Log-probabilities [B, V]: each row its own order of the tokens and its own slope, no two of a row alike.

    Up to 16 tokens share nearly all. The likeliest has about 0.16 of it, and each next 0.8 to 0.9 of that before.
    """
    rank = torch.arange(V, dtype=torch.float64)
    ratio = torch.linspace(*RATIOS, B, dtype=torch.float64) if B > 1 else torch.tensor([sum(RATIOS) / 2])
    logits = rank * ratio[:, None].log().double()
    logits[:, DISTINCT:] -= 12
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(V, generator=generator) for _ in range(B)])
    return logits.log_softmax(-1).gather(-1, order)


class Caught(TorchFunctionMode):
    """Sees the weights handed to torch.multinomial, and may say itself which of a row is drawn."""

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
    """A stage whose model always says `given` [B, V], and what its generate makes of that."""

    on: Stage
    given: Tensor

    def __post_init__(self) -> None:
        self.given = self.given.index_fill(1, torch.tensor(self.on.banned, dtype=torch.long), -torch.inf)
        self.prompts = self.on.subject.tokens(len(self.given), 2, seed=self.on.subject.seed)

    def likeliest(self, temperature: float = 1.0) -> Tensor:
        """The right probabilities [B, V] at a temperature, the largest first."""
        return (self.given / temperature).softmax(dim=-1).sort(dim=-1, descending=True).values

    def kept(self, options: dict[str, Any]) -> Tensor | None:
        """The probabilities [B, V] from which each row's token is drawn, sorted; None if the sampler is not seen."""
        caught = self.catch(None, **options)[0]
        if len(caught) != len(self.given):
            return None
        padded = torch.zeros_like(self.given)
        padded[:, : caught.shape[1]] = caught[:, : padded.shape[1]]
        return (padded / padded.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True).values

    def catch(self, forced: int | None, **options: Any) -> tuple[Tensor, Tensor]:
        """The weights [B, K] of a draw a row, as they were handed over, and the tokens [B] that came out."""
        self.on.script = dealt(self.given)
        with seeded(self.on.subject.seed), Caught(forced) as caught:
            said = self.on.generate(self.prompts, 1, **options)
        same = {weights.shape[-1] for weights in caught.weights}
        weights = torch.cat(caught.weights) if len(same) == 1 else torch.empty(0, 0)
        return weights, torch.tensor([row[0] for row in said])

    def counts(self, options: dict[str, Any], *, draw: int = 0) -> Tensor:
        """How often each token [V] came out of some 768 draws from the first row's probabilities."""
        self.on.script = dealt(self.given[:1])
        rows, n = 64 if self.on.decoder.batched else 8, max(1, min(self.on.block_size, 24) - 2)
        prompts, V = self.on.subject.tokens(rows, 2), self.given.shape[1]
        counts = torch.zeros(V, dtype=torch.long)
        for call in range(-(-DRAWS // (rows * n))):
            with seeded(self.on.subject.seed + 1000 * draw + call):
                said = self.on.generate(prompts, n, **options)
            counts += torch.tensor(said).flatten().clamp(0, V - 1).bincount(minlength=V)
        return counts

    def first_row(self, kept: int, temperature: float = 1.0) -> Tensor:
        """The right probabilities [V] of the first row when its `kept` likeliest tokens are."""
        p = (self.given[0] / temperature).softmax(0)
        order = p.argsort(descending=True)
        return torch.zeros_like(p).index_copy(0, order[:kept], p[order[:kept]] / p[order[:kept]].sum())


def unlikely(counts: Tensor, probabilities: Tensor) -> float:
    """How often right draws would lie at least as far from these probabilities, by Pearson's χ²; 0 if impossible.

    Cells with fewer than 5 expected draws count as one.
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
