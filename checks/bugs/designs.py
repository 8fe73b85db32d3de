"""Correct models that the reference is not: sliding windows, ALiBi, sinusoidal positions, packed documents.

Each function gives parts as `reference_parts` does. They are damaged by bugs of what they alone have, and are controls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import (
    Block,
    ExplicitAttention,
    KeyValueCache,
    LearnedPositions,
    Rotation,
    Transformer,
    causal_mask,
)
from ..reference import reference_parts

WINDOW = 4


def changed(change: Callable[[Transformer], None], **config: Any) -> SimpleNamespace:
    """The reference's parts with every model that they build changed."""
    parts = reference_parts(**config)
    build = parts.build_model

    def build_changed(**sizes: Any) -> nn.Module:
        model: Transformer = build(**sizes)
        change(model)
        return model

    parts.build_model = build_changed
    return parts


def attentions(model: Transformer) -> list[Any]:
    return [block.attention for block in model.blocks]


# -- low-rank adaptation (Hu et al. 2021)


class LowRank(nn.Module):
    """A linear layer and an update of low rank: its first factor is drawn at random, its second starts at zero."""

    def __init__(self, inner: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.inner, self.down = inner, nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.up(self.down(x))
        return out


def low_rank(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        for block in model.blocks:
            block.feed_forward.output = LowRank(block.feed_forward.output)  # type: ignore[union-attr, arg-type]

    return changed(change, **config)


# -- sliding windows (Beltagy et al. 2020; as Mistral counts: a token sees itself and window - 1 before it)


class WindowAttention(ExplicitAttention):
    window: int

    def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
        return super().mask(scores, visible & self.near(scores.shape[-2], scores.shape[-1], scores.device))

    def near(self, T: int, S: int, device: torch.device) -> Tensor:
        """[T, S], True where a key is at most window - 1 before the query, or after it."""
        return ~causal_mask(T, S, device).tril(S - T - self.window)


def sliding_window(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        for attention in attentions(model):
            attention.__class__ = WindowAttention
            attention.window = WINDOW

    return changed(change, attention="explicit", **config)


# -- attention with linear biases (Press et al. 2022)


class NoPositions(nn.Module):
    """Nothing is added to the tokens, nothing is turned."""

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        return x

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        return lambda x: x


class AlibiAttention(ExplicitAttention):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) - self.slopes(q)[:, None, None] * self.distance(q.shape[-2], k.shape[-2], q)

    def slopes(self, like: Tensor) -> Tensor:
        """[H]: 2^(-8/H), 2^(-16/H), … 2^-8, for a number of heads that is a power of two."""
        return 2 ** (-8 / self.n_head * torch.arange(1, self.n_head + 1, device=like.device, dtype=like.dtype))

    def distance(self, T: int, S: int, like: Tensor) -> Tensor:
        """[T, S]: how far the key is before the query."""
        queries = torch.arange(S - T, S, device=like.device, dtype=like.dtype)
        return queries[:, None] - torch.arange(S, device=like.device, dtype=like.dtype)


def alibi(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.positions = NoPositions()
        for attention in attentions(model):
            attention.__class__ = AlibiAttention

    return changed(change, attention="explicit", **config)


def no_positions(**config: Any) -> SimpleNamespace:
    """NoPE (Kazemnejad et al. 2023): the causal mask is all that tells a deep model where a token stands."""

    def change(model: Transformer) -> None:
        model.positions = NoPositions()

    return changed(change, **config)


# -- sinusoidal positions (Vaswani et al. 2017, section 3.5)


class SinusoidalPositions(LearnedPositions):
    """The reference's table, filled by formula and never trained."""

    def fill(self) -> None:
        places, width = self.table.weight.shape
        angles = torch.arange(places)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
        with torch.no_grad():
            self.table.weight.copy_(torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1))
        self.table.weight.requires_grad_(False)


def sinusoidal(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.positions.__class__ = SinusoidalPositions
        model.positions.fill()

    return changed(change, **config)


# -- documents packed into one row


class PackedTransformer(Transformer):
    """`documents` [B, T] tells which document of its row a token belongs to, in rising order."""

    documents: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        self.documents = documents
        try:
            return super().forward(tokens, mask, cache)
        finally:
            self.documents = None

    def visible(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
        visible = super().visible(mask, T, S, device)
        if self.documents is None:
            return visible
        together = self.documents[:, None, :, None] == self.documents[:, None, None, :]
        return together & (causal_mask(T, S, device) if visible is None else visible)

    def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
        positions = super().token_positions(mask, T, S, device)
        if self.documents is None:
            return positions
        return positions - self.starts(positions.expand_as(self.documents))

    def starts(self, positions: Tensor) -> Tensor:
        """[B, T]: the position at which a token's document starts."""
        assert self.documents is not None
        new = torch.ones_like(self.documents, dtype=torch.bool)
        new[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return torch.where(new, positions, 0).cummax(dim=1).values


def packed(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = PackedTransformer

    return changed(change, **config)


class PartedTransformer(PackedTransformer):
    """Takes no document ids: an end token ends its document. It has no cache."""

    eos_id: int
    new_cache = None  # type: ignore[assignment]

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, mask, None, self.counted((tokens == self.eos_id).long()))

    def counted(self, ends: Tensor) -> Tensor:
        """[B, T]: the number of a token's document; an end belongs to the one that it ends."""
        return ends.cumsum(dim=1) - ends


def parted(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = PartedTransformer
        model.eos_id = 0  # type: ignore[assignment]

    parts = changed(change, **config)
    parts.generate = None  # the reference's takes a cache
    return parts


# -- targets handed to the forward


class TaughtTransformer(Transformer):
    """Takes the tokens to be predicted, as many do for a loss of their own; here they are not looked at."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        targets: Tensor | None = None,
    ) -> Any:
        if targets is None:
            return super().forward(tokens, mask, cache)
        hidden: list[Tensor] = []
        hook = self.norm.register_forward_hook(lambda module, args, output: hidden.append(output))
        logits = super().forward(tokens, mask, cache)
        hook.remove()
        return self.taught(hidden[-1], logits, targets)

    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Any:
        """What it gives where it is handed targets [B, T], of the last hidden states [B, T, C] and the logits."""
        return logits


def taught(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = TaughtTransformer

    return changed(change, **config)


# -- mixtures of experts (Shazeer et al. 2017; weighted as Mixtral does: a softmax over the chosen ones)

EXPERTS, CHOSEN = 4, 2


class Experts(nn.Module):
    """Each token uses the CHOSEN experts that the router scores highest, by weights that add up to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.routed: list[tuple[Tensor, Tensor]] | None = None  # scores and choices, where they are asked for
        self.make(width)

    def make(self, width: int) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, C]
        scores = self.router(flat)
        weights, chosen = self.choose(scores)
        if self.routed is not None:
            self.routed.append((scores, chosen))
        return self.mixed(flat, weights, chosen).view_as(x)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [N, CHOSEN] by scores [N, EXPERTS]."""
        weights, chosen = self.probabilities(scores).topk(CHOSEN, dim=-1)
        return self.normalised(weights), chosen

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def normalised(self, weights: Tensor) -> Tensor:
        return weights / weights.sum(-1, keepdim=True)

    def mixed(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        mixed = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            mixed = mixed.index_add(0, token, weights[token, slot, None] * expert(flat[token]))
        return mixed


class StackedExperts(Experts):
    """All experts in one tensor per weight; every token goes through all of them, most with a weight of zero."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def make(self, width: int) -> None:
        shapes = dict(w1=(width, 2 * width), b1=(2 * width,), w2=(2 * width, width), b2=(width,))
        for name, shape in shapes.items():
            drawn = torch.randn(EXPERTS, *shape) * width**-0.5
            setattr(self, name, nn.Parameter(drawn))

    def mixed(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        share = weights.new_zeros(len(flat), EXPERTS).scatter(1, chosen, weights)  # [N, E]
        hidden = F.gelu(torch.einsum("nc,ecf->nef", flat, self.w1) + self.b1)
        return self.weighted(torch.einsum("nef,efc->nec", hidden, self.w2), share)

    def weighted(self, out: Tensor, share: Tensor) -> Tensor:
        """The sum over experts of their outputs [N, E, C] before the bias, by their shares [N, E]."""
        return torch.einsum("nec,ne->nc", out + self.b2, share)


class BalancedTransformer(TaughtTransformer):
    """Adds to its loss what makes the experts be used alike (Fedus et al. 2021, eq. 4)."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        targets: Tensor | None = None,
    ) -> Any:
        for layer in self.mixtures():
            layer.routed = []
        try:
            return super().forward(tokens, mask, cache, targets)
        finally:
            for layer in self.mixtures():
                layer.routed = None

    def mixtures(self) -> list[Experts]:
        return [module for module in self.modules() if isinstance(module, Experts)]

    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Any:
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        balance = [self.balance(*routed) for layer in self.mixtures() for routed in layer.routed or ()]
        return logits, loss + 0.01 * torch.stack(balance).sum()

    def balance(self, scores: Tensor, chosen: Tensor) -> Tensor:
        tokens = F.one_hot(chosen, EXPERTS).sum(1).to(scores).mean(0)  # the share of tokens that each expert gets
        return EXPERTS * (tokens * self.probability(scores)).sum()

    def probability(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).mean(0)


def _experts(kind: type[Experts], whole: type[Transformer] = Transformer) -> Callable[..., SimpleNamespace]:
    def make(**config: Any) -> SimpleNamespace:
        def change(model: Transformer) -> None:
            model.__class__ = whole
            for block in model.blocks:
                block.feed_forward = kind(model.config.n_embd)

        return changed(change, **config)

    return make


experts, stacked_experts = _experts(Experts), _experts(StackedExperts)
balanced_experts = _experts(Experts, BalancedTransformer)


# -- positions handed to the forward


class PlacedTransformer(Transformer):
    """Takes the place of every token, [B, T] or [T], where the caller knows better than the mask."""

    given: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        self.given = position_ids
        try:
            return super().forward(tokens, mask, cache)
        finally:
            self.given = None

    def token_positions(self, mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
        return super().token_positions(mask, T, S, device) if self.given is None else self.given


def placed(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = PlacedTransformer

    return changed(change, **config)


# -- logits of the latest positions only


class KeepingTransformer(Transformer):
    """Gives the logits of the last `logits_to_keep` positions, as decoding needs them; 0 for all."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        return self.keep(super().forward(tokens, mask, cache), logits_to_keep)

    def keep(self, logits: Tensor, n: int) -> Tensor:
        return logits[:, -n:]


def keeping(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        model.__class__ = KeepingTransformer

    return changed(change, **config)


# -- a train_step without a trainer

SIZE = 2  # rows of a micro-batch
CLIP_AT, UNSCALE, STEP = "clip", "unscale", "step"
ORDER = (UNSCALE, CLIP_AT, STEP)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    scheduler: Any = None,
    scaler: Any = None,
    max_norm: float | None = None,
) -> float:
    """One step on (tokens, targets), in micro-batches; targets of -100 carry no loss."""
    return a_step(model, optimizer, batch, scheduler, scaler, max_norm)


def a_step(
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    scheduler: Any,
    scaler: Any,
    max_norm: float | None,
    *,
    micro: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda total, count, whole: total / whole,
    order: tuple[str, ...] = ORDER,
) -> float:
    """`micro(sum of losses, its targets, all targets)` is what backward is called on; `order` is that of the end."""
    tokens, targets = batch
    whole, reported = (targets != -100).sum(), 0.0
    model.train()
    optimizer.zero_grad()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for x, y in zip(tokens.split(SIZE), targets.split(SIZE), strict=True):
        total = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        scaler.scale(micro(total, (y != -100).sum(), whole)).backward()
        reported += float(total.detach() / whole)
    for what in order:
        if what == UNSCALE:
            scaler.unscale_(optimizer)
        elif what == CLIP_AT and max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        elif what == STEP:
            scaler.step(optimizer)
            scaler.update()
    if scheduler is not None:
        scheduler.step()
    return reported


def parts_with_a_step(**config: Any) -> SimpleNamespace:
    """The reference's model and a train_step, without its trainer."""
    return SimpleNamespace(build_model=reference_parts(**config).build_model, train_step=train_step)


# -- stochastic depth (Huang et al. 2016), row by row


class StochasticBlock(Block):
    left_out = 0.2  # of the branches, in training

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        update = self.dropout(update) * self.scale()
        if not self.training:
            return x + update
        return x + update * (torch.rand(len(x), 1, 1, device=x.device) >= self.left_out)

    def scale(self) -> float:
        """Of an update that is kept."""
        return 1 / (1 - self.left_out) if self.training else 1.0


def stochastic_depth(**config: Any) -> SimpleNamespace:
    def change(model: Transformer) -> None:
        for block in model.blocks:
            block.__class__ = StochasticBlock

    return changed(change, **config)
