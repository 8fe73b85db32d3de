"""Wrong dropout: its rate and scale, where it is applied, how its masks are drawn. On in eval mode: another file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, Block, ExplicitAttention, Transformer, causal_mask
from ..check_modes import (
    check_dropout_differs_between_rows,
    check_dropout_draws_anew,
    check_dropout_keeps_the_average,
    check_dropout_obeys_its_rate,
    check_every_dropout_site_drops,
)
from ..check_spec import check_dropout_sites_are_the_familys
from . import bug
from .damage import EXPLICIT, GELU, GPT2, attend_with, blocks, redefine

# -- rate and scale


@bug("F.dropout is called without the configured rate and drops half", check_dropout_obeys_its_rate)
def dropout_rate_ignored(model: Transformer) -> None:
    class Half(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            return x + F.dropout(update, training=self.training)

    model.blocks[-1].__class__ = Half


@bug("the dropout rate is used as the probability of keeping a unit", check_dropout_obeys_its_rate)
def dropout_rate_means_kept(model: Transformer) -> None:
    class Kept(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 1 - self.p, self.training and self.p > 0)

    model.dropout.__class__ = Kept


@bug("dropout divides what it keeps by p instead of 1 - p", check_dropout_obeys_its_rate)
def dropout_scaled_by_its_rate(model: Transformer) -> None:
    class WrongScale(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            p = self.dropout.p
            if not self.training or p == 0:
                return x + update
            return x + update * (torch.rand_like(update) >= p) / p

    model.blocks[0].__class__ = WrongScale


@bug("hand-written dropout does not divide what it keeps by 1 - p", check_dropout_obeys_its_rate)
def dropout_without_rescaling(model: Transformer) -> None:
    class Unscaled(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.rand_like(x) >= self.p) if self.training else x

    for block in blocks(model):
        block.dropout.__class__ = Unscaled


@bug("dropout is rescaled in training and once more, by 1 - p, in eval mode", check_dropout_obeys_its_rate)
def dropout_scaled_in_evaluation_too(model: Transformer) -> None:
    class ScaledTwice(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            dropped: Tensor = self.dropout(update)
            return x + dropped * (1.0 if self.training else 1 - self.dropout.p)

    model.blocks[-1].__class__ = ScaledTwice


@bug("attention dropout is divided by 1 - p twice", check_dropout_keeps_the_average, attention="explicit")
def dropout_rescaled_twice(model: Transformer) -> None:
    class Twice(ExplicitAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            y = super().attend(q, k, v, visible)
            return y / (1 - self.dropout) if self.training else y

    attend_with(model, Twice)


@bug("hand-written attention dropout is not rescaled", check_dropout_keeps_the_average, attention="explicit")
def dropout_by_hand_not_rescaled(model: Transformer) -> None:
    class ByHand(ExplicitAttention):
        def weights(self, scores: Tensor) -> Tensor:
            weights = super().weights(scores)
            return weights * (torch.rand_like(weights) >= self.dropout) if self.training else weights

        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            if visible is None:
                visible = causal_mask(q.shape[2], k.shape[2], q.device)
            return self.weights(self.mask(self.scores(q, k), visible)) @ v

    attend_with(model, ByHand)


# -- where it is applied


@bug("attention has a dropout rate and does not pass it to the kernel", check_every_dropout_site_drops)
def attention_dropout_not_applied(model: Transformer) -> None:
    class Undropped(Attention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1
            )

    blocks(model)[-1].attention.__class__ = Undropped


@bug("the dropout after the embedding is created and never called", check_every_dropout_site_drops)
def dropout_call_forgotten(model: Transformer) -> None:
    class LendsItsRate(Attention):
        """The rate is that of a module that only another path would call."""

        attention_dropout: nn.Dropout

        def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            rate = self.attention_dropout.p if self.training else 0.0
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None and q.shape[2] > 1, dropout_p=rate
            )

    for block in blocks(model):
        block.attention.__class__ = LendsItsRate
        block.attention.attention_dropout = nn.Dropout(model.config.dropout)
    model.embedding_dropout, model.dropout = model.dropout, nn.Identity()  # type: ignore[assignment]


@bug("the dropout after the embedding is called and its result is not used", check_every_dropout_site_drops)
def dropout_result_dropped(model: Transformer) -> None:
    class Ignored(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return x

    model.dropout.__class__ = Ignored


@bug("no dropout after the feed-forward", check_dropout_sites_are_the_familys, **GELU)
def dropout_site_missing(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.attention(self.attention_norm(x), *others))
        undropped: Tensor = self.feed_forward(self.feed_forward_norm(x))
        return x + undropped

    for block in blocks(model):
        redefine(block, forward=forward)


@bug("dropout is applied twice before each residual sum", check_dropout_sites_are_the_familys, **GELU)
def dropout_twice(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x + self.dropout(self.dropout(update)))


@bug("dropout is applied to attention scores, not attention weights", check_dropout_sites_are_the_familys, **EXPLICIT)
def dropout_before_the_softmax(model: Transformer) -> None:
    def attend(self: ExplicitAttention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = F.dropout(self.scores(q, k), self.dropout, self.training)
        return scores.masked_fill(hidden if visible is None else ~visible, -torch.inf).softmax(dim=-1) @ v

    for block in blocks(model):
        redefine(block.attention, attend=attend)


@bug("an extra dropout follows the norm before attention", check_dropout_sites_are_the_familys, **GPT2)
def dropout_on_the_norm(model: Transformer) -> None:
    rate = model.config.dropout
    for block in blocks(model):
        redefine(
            block.attention_norm, forward=lambda self, x: F.dropout(nn.LayerNorm.forward(self, x), rate, self.training)
        )


@bug("an extra dropout follows the activation, as in Vaswani et al. 2017", check_dropout_sites_are_the_familys, **GELU)
def dropout_inside_the_feed_forward(model: Transformer) -> None:
    rate = model.config.dropout
    for block in blocks(model):
        redefine(
            block.feed_forward,
            activation=lambda self, x: F.dropout(F.gelu(x, approximate="tanh"), rate, self.training),
        )


# -- the masks


@bug("the dropout mask is drawn once and reused in every step", check_every_dropout_site_drops)
def dropout_mask_drawn_once(model: Transformer) -> None:
    class Once(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            generator = torch.Generator(x.device).manual_seed(0)
            kept = torch.rand(x.shape, generator=generator, device=x.device) >= self.p
            return x * kept / (1 - self.p) if self.training else x

    model.dropout.__class__ = Once


@bug("all rows of a batch share one dropout mask", check_dropout_differs_between_rows)
def dropout_mask_shared_by_rows(model: Transformer) -> None:
    class Shared(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            p = self.dropout.p
            if not self.training:
                return x + update
            return x + update * (torch.rand_like(update[:1]) >= p) / (1 - p)

    model.blocks[-1].__class__ = Shared


@bug("dropout masks come from a generator that no seed reaches", check_dropout_draws_anew)
def dropout_from_its_own_generator(model: Transformer) -> None:
    class Unseeded(Block):
        def residual(self, x: Tensor, update: Tensor) -> Tensor:
            if not self.training:
                return x + update
            generator = torch.Generator()
            generator.seed()
            kept = torch.rand(update.shape, generator=generator) >= self.dropout.p
            return x + update * kept / (1 - self.dropout.p)

    model.blocks[0].__class__ = Unseeded
