"""Wrong norms: what is averaged, what it is divided by, epsilon, gain and bias, and norms missing or applied twice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Block, KeyValueCache, LearnedPositions, Rotation, Transformer
from ..check_causality import check_future_cannot_change_past, check_prefix_gives_the_same_logits
from ..check_distributed import check_two_processes_train_as_one
from ..check_gradients import check_every_parameter_gets_a_gradient, check_rows_get_their_own_gradient
from ..check_numerics import check_bfloat16_stays_close
from ..check_parts import (
    check_epsilon_does_not_rule_a_norm,
    check_gain_multiplies_and_bias_adds,
    check_norms_act_on_each_token_alone,
    check_norms_are_what_they_are_called,
    check_norms_take_out_the_scale,
)
from ..check_spec import check_logits_agree, check_tiny_activations_agree
from . import bug
from .damage import GPT2, LLAMA, block_norms, blocks, norms, redefine


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


def norm_with(model: Transformer, kind: type[Norm]) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = kind


# -- over what it averages


@bug(
    "the norm averages over time as well: every token depends on all others",
    check_future_cannot_change_past,
    check_prefix_gives_the_same_logits,
    source="https://github.com/jadore801120/attention-is-all-you-need-pytorch/pull/17",
)
def norm_over_sequence(model: Transformer) -> None:
    class OverTime(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    blocks(model)[0].feed_forward_norm.__class__ = OverTime


@bug("the norm averages over all earlier tokens' features, not one token's alone", check_norms_act_on_each_token_alone)
def norm_averages_over_the_past(model: Transformer) -> None:
    class OverThePast(Norm):
        def size(self, x: Tensor) -> Tensor:
            squares = x.square().mean(-1, keepdim=True).cumsum(-2)
            tokens = torch.arange(1, x.shape[-2] + 1, device=x.device)[:, None]
            return (squares / tokens + self.eps).sqrt()

    norm_with(model, OverThePast)


@bug("the norm averages over the batch: a row depends on the other rows", check_rows_get_their_own_gradient)
def norm_over_batch(model: Transformer) -> None:
    class OverRows(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = x.mean(0, keepdim=True), x.var(0, keepdim=True, unbiased=False)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias

    for norm in block_norms(model):
        norm.__class__ = OverRows


@bug("in training the final norm subtracts the batch mean: rows depend on others", check_two_processes_train_as_one)
def normalized_over_the_batch(model: Transformer) -> None:
    class Batch(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x - x.mean(0, keepdim=True) if self.training and len(x) > 1 else x

    model.norm.__class__ = Batch


# -- mean and variance


@bug("LayerNorm does not subtract the mean", check_logits_agree, **GPT2)
def norm_without_mean(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return normed if self.bias is None else normed + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug("LayerNorm adds the mean instead of subtracting it", check_norms_take_out_the_scale)
def norm_adds_the_mean(model: Transformer) -> None:
    class Adds(Norm):
        def centred(self, x: Tensor) -> Tensor:
            return x + x.mean(-1, keepdim=True)

    norm_with(model, Adds)


@bug("LayerNorm divides by the variance instead of its square root", check_norms_take_out_the_scale)
def norm_divides_by_variance(model: Transformer) -> None:
    class ByVariance(Norm):
        def size(self, x: Tensor) -> Tensor:
            return x.square().mean(-1, keepdim=True) + self.eps

    norm_with(model, ByVariance)


@bug("LayerNorm subtracts the mean and does not divide by the standard deviation", check_norms_take_out_the_scale)
def norm_divides_by_nothing(model: Transformer) -> None:
    class Centres(Norm):
        def size(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    norm_with(model, Centres)


@bug("LayerNorm uses the unbiased variance, over C - 1 features instead of C", check_logits_agree, **GPT2)
def norm_unbiased_variance(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=True) + self.eps).sqrt()
        return normed * self.weight if self.bias is None else normed * self.weight + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "LayerNorm divides by the unbiased deviation plus epsilon, as in the Annotated Transformer",
    check_logits_agree,
    source="https://github.com/harvardnlp/annotated-transformer",
    **GPT2,
)
def norm_unbiased_deviation(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)
        return normed * self.weight if self.bias is None else normed * self.weight + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug("RMSNorm uses the sum of squares, not the mean", check_logits_agree, check_norms_are_what_they_are_called, **LLAMA)
def rms_sum_not_mean(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt() * self.weight)


@bug("RMSNorm subtracts the mean, as LayerNorm does", check_logits_agree, check_norms_are_what_they_are_called, **LLAMA)
def rms_subtracts_mean(model: Transformer) -> None:
    def forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)  # type: ignore[arg-type]

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "RMSNorm divides by rsqrt(…), the inverse root: large inputs become larger",
    check_logits_agree,
    source="https://github.com/mosaicml/llm-foundry/issues/371",
    **LLAMA,
)
def rms_divided_by_the_inverse_root(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight)


@bug(
    "RMSNorm sums the squares in bfloat16, where a large sum stops growing",
    check_bfloat16_stays_close,
    source="https://github.com/sgl-project/sglang/pull/27540",
    norm="rms",
)
def rms_in_half_precision(model: Transformer) -> None:
    class InItsOwnType(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros_like(x[..., 0])
            for feature in x.unbind(-1):
                total = total + feature * feature
            return x * (total / x.shape[-1] + (self.eps or 0.0)).rsqrt()[..., None] * self.weight

    for norm in block_norms(model):
        norm.__class__ = InItsOwnType


# -- epsilon


@bug("RMSNorm adds epsilon outside the square root", check_logits_agree, **LLAMA)
def rms_eps_outside_sqrt(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight)


@bug(
    "the norms' epsilon is 0.1: it is not small against the variance",
    check_logits_agree,
    check_epsilon_does_not_rule_a_norm,
    source="https://github.com/NVIDIA/TensorRT-LLM/pull/7509",
    **GPT2,
)
def norm_wrong_eps(model: Transformer) -> None:
    for norm in norms(model):
        norm.eps = 0.1


@bug("the norms' epsilon is 1: small inputs stay small", check_epsilon_does_not_rule_a_norm)
def norm_epsilon_of_one(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1.0


@bug("the norm's epsilon is a lower bound of the mean square, not added to it", check_tiny_activations_agree, **LLAMA)
def norm_epsilon_is_a_floor(model: Transformer) -> None:
    for norm in norms(model):
        redefine(
            norm, forward=lambda self, x: x * x.square().mean(-1, keepdim=True).clamp(min=1e-8).rsqrt() * self.weight
        )


@bug("the norms' epsilon is 2e-5 instead of 1e-5", check_tiny_activations_agree, **GPT2)
def norm_epsilon_doubled(model: Transformer) -> None:
    for norm in norms(model):
        norm.eps = 2e-5


# -- gain and bias


@bug(
    "RMSNorm multiplies by 1 + gain although the stored gain is already around one",
    check_logits_agree,
    source="https://github.com/utensils/mold/pull/1078",
    **LLAMA,
)
def rms_one_plus_weight_twice(model: Transformer) -> None:
    def forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug("the norms do not multiply by their gain", check_logits_agree, **LLAMA)
def norm_gain_missing(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: F.rms_norm(x, x.shape[-1:], None, self.eps))


@bug("the norm's gain is added instead of multiplied", check_gain_multiplies_and_bias_adds)
def norm_gain_added(model: Transformer) -> None:
    class Added(Norm):
        def finished(self, x: Tensor) -> Tensor:
            return x + self.weight + self.bias

    norm_with(model, Added)


@bug(
    "the norm's gain and bias are swapped: as initialized, its output is constant", check_gain_multiplies_and_bias_adds
)
def norm_gain_and_bias_swapped(model: Transformer) -> None:
    class Swapped(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, self.bias, self.weight, self.eps)

    norm_with(model, Swapped)


# -- missing, extra and shared norms


@bug("no norm before attention", check_logits_agree, **GPT2)
def attention_norm_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention_norm, forward=lambda self, x: x)


@bug("no norm before the feed-forward", check_logits_agree, **GPT2)
def feed_forward_norm_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward_norm, forward=lambda self, x: x)


@bug("no norm between the last block and the head", check_logits_agree, **GPT2)
def final_norm_missing(model: Transformer) -> None:
    model.norm = nn.Identity()


@bug("the final norm is applied twice", check_logits_agree, **GPT2)
def final_norm_twice(model: Transformer) -> None:
    redefine(model.norm, forward=lambda self, x: nn.LayerNorm.forward(self, nn.LayerNorm.forward(self, x)))


@bug("an extra norm follows the embedding", check_logits_agree, **GPT2)
def embedding_normed(model: Transformer) -> None:
    def add(self: LearnedPositions, x: Tensor, positions: Tensor) -> Tensor:
        return F.layer_norm(LearnedPositions.add(self, x, positions), x.shape[-1:])

    redefine(model.positions, add=add)


@bug(
    "attention's norm is used before the feed-forward too: the feed-forward's own is never trained",
    check_every_parameter_gets_a_gradient,
    source="https://github.com/ml-explore/mlx/issues/1636",
)
def norm_reused(model: Transformer) -> None:
    class OneNorm(Block):
        def forward(self, x: Tensor, rotate: Rotation, visible: Tensor | None, cache: KeyValueCache | None) -> Tensor:
            x = self.residual(x, self.attention(self.attention_norm(x), rotate, visible, cache))
            return self.residual(x, self.feed_forward(self.attention_norm(x)))

    blocks(model)[-1].__class__ = OneNorm
