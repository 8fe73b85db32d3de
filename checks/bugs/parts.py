"""Mistakes inside a part that shows in any model what it is: a norm, attention's weights, groups of heads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, ExplicitAttention, GeluFeedForward, Transformer
from . import bug
from .designs import changed
from .masking import attend_with

ALONE = "check_parts.check_norms_act_on_each_token_alone"
SCALE = "check_parts.check_norms_take_out_the_scale"
EPSILON = "check_parts.check_epsilon_does_not_rule_a_norm"
FACTORS = "check_parts.check_gain_multiplies_and_bias_adds"
ACTIVATION = "check_parts.check_activations_are_what_they_are_called"
SUMS = "check_parts.check_attention_weights_sum_to_one"
GROUPS = "check_parts.check_heads_that_share_keys_share_values"


class Norm(nn.LayerNorm):
    """A layer norm step by step, so that a bug overrides one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finished(self.centred(x) / self.size(self.centred(x)))

    def centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    def size(self, x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def finished(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class NewGELU(nn.Module):
    """The tanh form written out, as many have it from before PyTorch had it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + self.factor() * x**3)).tanh())

    def factor(self) -> float:
        return 0.044715


class WrittenOut(GeluFeedForward):
    act: NewGELU

    def activation(self, x: Tensor) -> Tensor:
        return self.act(x)


def written_out(**config: Any) -> SimpleNamespace:
    """The reference with its activation as a module of its own."""

    def change(model: Transformer) -> None:
        for module in model.modules():
            if isinstance(module, GeluFeedForward):
                module.__class__ = WrittenOut
                module.act = NewGELU()

    return changed(change, **config)


def norm_with(model: Transformer, kind: type[Norm]) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = kind


# -- norms


@bug("norm-averages-over-the-past", "the norm's mean square is taken over all tokens so far, not over one token",
     caught_by=(ALONE,), model=True)  # fmt: skip
def averages_over_the_past(model: Transformer) -> None:
    class OverThePast(Norm):
        def size(self, x: Tensor) -> Tensor:
            squares = x.square().mean(-1, keepdim=True).cumsum(-2)
            tokens = torch.arange(1, x.shape[-2] + 1, device=x.device)[:, None]
            return (squares / tokens + self.eps).sqrt()

    norm_with(model, OverThePast)


@bug("norm-divides-by-variance", "the norm divides by the variance and not by its root",
     caught_by=(SCALE,), model=True)  # fmt: skip
def divides_by_variance(model: Transformer) -> None:
    class ByVariance(Norm):
        def size(self, x: Tensor) -> Tensor:
            return x.square().mean(-1, keepdim=True) + self.eps

    norm_with(model, ByVariance)


@bug("norm-divides-by-nothing", "the norm subtracts the mean and divides by nothing",
     caught_by=(SCALE,), model=True)  # fmt: skip
def divides_by_nothing(model: Transformer) -> None:
    class Centres(Norm):
        def size(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    norm_with(model, Centres)


@bug("norm-adds-the-mean", "the norm adds the mean instead of subtracting it", caught_by=(SCALE,), model=True)
def adds_the_mean(model: Transformer) -> None:
    class Adds(Norm):
        def centred(self, x: Tensor) -> Tensor:
            return x + x.mean(-1, keepdim=True)

    norm_with(model, Adds)


@bug("norm-epsilon-of-one", "the norms' epsilon is 1: what is normed stays as small as it was",
     caught_by=(EPSILON,), model=True)  # fmt: skip
def epsilon_of_one(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1.0


@bug("norm-gain-and-bias-swapped", "the norm is given its bias for its gain: as initialized it gives ones, whatever "
     "it reads", caught_by=(FACTORS,), model=True)  # fmt: skip
def gain_and_bias_swapped(model: Transformer) -> None:
    class Swapped(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.bias, self.weight, self.eps)

    norm_with(model, Swapped)


@bug("norm-gain-added", "the norm's gain is added, and multiplies nothing", caught_by=(FACTORS,), model=True)
def gain_added(model: Transformer) -> None:
    class Added(Norm):
        def finished(self, x: Tensor) -> Tensor:
            return x + self.weight + self.bias

    norm_with(model, Added)


# -- activations


@bug("gelu-written-wrong", "the GELU written out has x³ without its factor 0.044715",
     caught_by=(ACTIVATION,), model=True, of=written_out)  # fmt: skip
def gelu_written_wrong(model: Transformer) -> None:
    class WithoutFactor(NewGELU):
        def factor(self) -> float:
            return 1.0

    WithoutFactor.__name__ = NewGELU.__name__  # the name by which it is known
    for module in model.modules():
        if isinstance(module, NewGELU):
            module.__class__ = WithoutFactor


# -- attention


@bug("softmax-over-heads-masked-after", "the softmax runs over heads, and the mask comes after it",
     caught_by=(SUMS,), model=True, attention="explicit")  # fmt: skip
def softmax_over_heads_then_masked(model: Transformer) -> None:
    class Heads(ExplicitAttention):
        def mask(self, scores: Tensor, visible: Tensor) -> Tensor:
            return scores.softmax(dim=1) * visible

        def weights(self, scores: Tensor) -> Tensor:
            return scores

    attend_with(model, Heads)


@bug("gqa-groups-of-different-sizes", "one query head has a key-value head for itself, all others share the rest",
     caught_by=(GROUPS,), model=True, n_kv_head=2)  # fmt: skip
def groups_of_different_sizes(model: Transformer) -> None:
    class Uneven(Attention):
        def share(self, x: Tensor) -> Tensor:
            head = torch.arange(self.n_head, device=x.device)
            return x[:, (head - self.n_head + self.n_kv_head).clamp(min=0)]

    attend_with(model, Uneven)
