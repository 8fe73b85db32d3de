"""Bugs that leave a model of its own: no law is broken, but it is not the GPT-2 or the Llama that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import Attention, Block, Transformer
from . import bug

LOGITS = "check_spec.check_logits_agree"
SCALE = "check_spec.check_attention_scale_is_usual"
BENDS = "check_parts.check_feed_forward_is_not_linear"
PAST = "check_parts.check_tokens_get_past_a_silent_part"
CALLED = "check_parts.check_norms_are_what_they_are_called"
GROUPS = "check_parts.check_heads_that_share_keys_share_values"
EPSILON = "check_parts.check_epsilon_does_not_rule_a_norm"

GPT2: dict[str, Any] = dict(spec="gpt2")
GELU: dict[str, Any] = dict(GPT2, feed_forward="gelu")  # for what a gate does not have
LLAMA: dict[str, Any] = dict(
    spec="llama", positions="rotary", norm="rms", feed_forward="swiglu", bias=False, tied=False, norm_eps=1e-6
)


def redefine(module: nn.Module, **methods: Callable) -> None:
    """Gives one module other methods, by a class of its own."""
    module.__class__ = type(type(module).__name__, (type(module),), methods)


def blocks(model: Transformer) -> list[Block]:
    return list(model.blocks)  # type: ignore[arg-type]


def norms(model: Transformer) -> list[nn.Module]:
    return [*(norm for block in blocks(model) for norm in (block.attention_norm, block.feed_forward_norm)), model.norm]


# -- attention


@bug(
    "scale-missing",
    "attention scores are not divided by √D, the square root of the head width",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def scale_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: 1.0)


@bug(
    "scale-multiplied",
    "attention scores are multiplied by √D instead of divided by it",
    caught_by=(LOGITS, SCALE),
    model=True,
    **GPT2,
)
def scale_multiplied(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: self.head_width**0.5)


@bug(
    "scale-by-d-model",
    "attention scores are divided by the square root of the model's width, not of a head's",
    caught_by=(LOGITS, SCALE),
    model=True,
    **GPT2,
)
def scale_by_d_model(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: (self.n_head * self.head_width) ** -0.5)


@bug(
    "scale-without-root",
    "attention scores are divided by the head width D, not by its square root",
    caught_by=(LOGITS, SCALE),
    model=True,
    **GPT2,
)
def scale_without_root(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention, scale=lambda self: 1 / self.head_width)


@bug(
    "scale-twice",
    "attention scores are divided by √D twice: once by hand and once inside the kernel",
    source="https://github.com/pytorch/pytorch/issues/96099",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def scale_twice(model: Transformer) -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        return type(self).__mro__[1].attend(self, q * self.scale(), k, v, visible)  # type: ignore[attr-defined]

    for block in blocks(model):
        redefine(block.attention, attend=attend)


@bug(
    "gqa-k-v-grouping-mismatch",
    "query head h reads the keys of group h // (H/G) but the values of group h mod G",
    caught_by=(LOGITS, GROUPS),
    model=True,
    n_kv_head=2,
    **LLAMA,
)
def keys_and_values_of_different_groups(model: Transformer) -> None:
    def attend(self: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        groups = v[:, :: self.n_head // self.n_kv_head]
        tiled = groups.repeat(1, self.n_head // self.n_kv_head, 1, 1)
        return type(self).__mro__[1].attend(self, q, k, tiled, visible)  # type: ignore[attr-defined]

    for block in blocks(model):
        redefine(block.attention, attend=attend)


# -- positions


@bug(
    "position-multiplied",
    "the position vectors multiply the token vectors instead of being added",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def position_multiplied(model: Transformer) -> None:
    redefine(model.positions, add=lambda self, x, positions: x * self.table(positions))


# -- norms


@bug(
    "norm-unbiased-variance",
    "the norm divides by the variance over C - 1 features, not C",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def norm_unbiased_variance(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=True) + self.eps).sqrt()
        return normed * self.weight if self.bias is None else normed * self.weight + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "norm-unbiased-deviation",
    "the norm divides by the unbiased standard deviation plus epsilon, as the Annotated Transformer does",
    source="https://github.com/harvardnlp/annotated-transformer",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def norm_unbiased_deviation(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps)
        return normed * self.weight if self.bias is None else normed * self.weight + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "norm-without-mean",
    "the layer norm does not subtract the mean",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def norm_without_mean(model: Transformer) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return normed if self.bias is None else normed + self.bias

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "rms-sum-not-mean",
    "RMSNorm divides by the root of the sum of squares, not of their mean",
    caught_by=(LOGITS, CALLED),
    model=True,
    **LLAMA,
)
def rms_sum_not_mean(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt() * self.weight)


@bug(
    "rms-eps-outside-sqrt",
    "RMSNorm adds epsilon to the root, not to the mean square inside it",
    caught_by=(LOGITS,),
    model=True,
    **LLAMA,
)
def rms_eps_outside_root(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight)


@bug(
    "rms-subtracts-mean",
    "RMSNorm subtracts the mean first, as a layer norm does",
    caught_by=(LOGITS, CALLED),
    model=True,
    **LLAMA,
)
def rms_subtracts_mean(model: Transformer) -> None:
    def forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)  # type: ignore[arg-type]

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "norm-wrong-eps",
    "the norms' epsilon is 0.1: it is no longer small against the variance",
    source="https://github.com/NVIDIA/TensorRT-LLM/pull/7509",
    caught_by=(LOGITS, EPSILON),
    model=True,
    **GPT2,
)
def norm_wrong_eps(model: Transformer) -> None:
    for norm in norms(model):
        norm.eps = 0.1  # type: ignore[assignment]


@bug(
    "rms-one-plus-weight-twice",
    "RMSNorm multiplies by 1 + gain although the stored gain is already around one",
    source="https://github.com/utensils/mold/pull/1078",
    caught_by=(LOGITS,),
    model=True,
    **LLAMA,
)
def rms_one_plus_weight_twice(model: Transformer) -> None:
    def forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    for norm in norms(model):
        redefine(norm, forward=forward)


@bug(
    "norm-gain-missing",
    "the norms do not multiply by their gain",
    caught_by=(LOGITS,),
    model=True,
    **LLAMA,
)
def norm_gain_missing(model: Transformer) -> None:
    for norm in norms(model):
        redefine(norm, forward=lambda self, x: F.rms_norm(x, x.shape[-1:], None, self.eps))


@bug(
    "final-norm-missing",
    "no norm between the last block and the head",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def final_norm_missing(model: Transformer) -> None:
    model.norm = nn.Identity()


@bug(
    "final-norm-twice",
    "the final norm is applied twice",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def final_norm_twice(model: Transformer) -> None:
    redefine(model.norm, forward=lambda self, x: nn.LayerNorm.forward(self, nn.LayerNorm.forward(self, x)))


@bug(
    "attention-norm-missing",
    "attention reads the residual stream without a norm",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def attention_norm_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.attention_norm, forward=lambda self, x: x)


@bug(
    "feed-forward-norm-missing",
    "the feed-forward reads the residual stream without a norm",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def feed_forward_norm_missing(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward_norm, forward=lambda self, x: x)


# -- the residual stream


@bug(
    "residual-from-normed-input",
    "the residual is taken after the norm: norm(x) + f(norm(x)) instead of x + f(norm(x))",
    source="https://github.com/Howuhh/faster-trajectory-transformer/issues/3",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def residual_from_normed_input(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        normed = self.attention_norm(x)
        x = self.residual(normed, self.attention(normed, *others))
        normed = self.feed_forward_norm(x)
        return self.residual(normed, self.feed_forward(normed))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug(
    "post-norm-for-pre-norm",
    "each norm comes after its addition (post-norm), not before attention and feed-forward",
    source="https://github.com/harvardnlp/annotated-transformer/issues/92",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def post_norm_for_pre_norm(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.attention_norm(self.residual(x, self.attention(x, *others)))
        return self.feed_forward_norm(self.residual(x, self.feed_forward(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug(
    "attention-residual-missing",
    "the attention's output replaces the residual stream instead of joining it",
    caught_by=(LOGITS, PAST),
    model=True,
    **GPT2,
)
def attention_residual_missing(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.dropout(self.attention(self.attention_norm(x), *others))
        return self.residual(x, self.feed_forward(self.feed_forward_norm(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug(
    "feed-forward-residual-missing",
    "the feed-forward's output replaces the residual stream instead of joining it",
    caught_by=(LOGITS, PAST),
    model=True,
    **GPT2,
)
def feed_forward_residual_missing(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        x = self.residual(x, self.attention(self.attention_norm(x), *others))
        return self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


@bug(
    "residual-subtracted",
    "what attention and feed-forward give is subtracted from the residual stream",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def residual_subtracted(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block, residual=lambda self, x, update: x - self.dropout(update))


@bug(
    "parallel-for-sequential",
    "attention and feed-forward read the same input side by side, not one after the other",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def parallel_for_sequential(model: Transformer) -> None:
    def forward(self: Block, x: Tensor, *others: Any) -> Tensor:
        update = self.attention(self.attention_norm(x), *others)
        return self.residual(self.residual(x, update), self.feed_forward(self.feed_forward_norm(x)))

    for block in blocks(model):
        redefine(block, forward=forward)


# -- the feed-forward


@bug(
    "mlp-no-activation",
    "the feed-forward has no activation: two linear layers in a row",
    source="https://github.com/leffff/graphormer-pyg/issues/23",
    caught_by=(LOGITS, BENDS),
    model=True,
    **GELU,
)
def no_activation(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x)


@bug(
    "activation-after-second-linear",
    "the activation comes after the second linear layer, not between the two",
    source="https://github.com/goruck/nilm/issues/1",
    caught_by=(LOGITS, BENDS),
    model=True,
    **GELU,
)
def activation_after_second_linear(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, forward=lambda self, x: self.activation(self.output(self.input(x))))


@bug(
    "gelu-variant",
    "GELU is approximated by x σ(1.702 x), which is neither GPT-2's tanh form nor the exact one",
    source="https://github.com/huggingface/transformers/pull/29402",
    caught_by=(LOGITS,),
    model=True,
    **GELU,
)
def quick_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x * torch.sigmoid(1.702 * x))


@bug("relu-for-gelu", "the feed-forward's activation is ReLU, not GELU", caught_by=(LOGITS,), model=True, **GELU)
def relu_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x))


@bug("silu-for-gelu", "the feed-forward's activation is SiLU, not GELU", caught_by=(LOGITS,), model=True, **GELU)
def silu_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.silu(x))


@bug(
    "gelu-for-silu",
    "the gate's activation is GELU, not SiLU: GEGLU for SwiGLU",
    caught_by=(LOGITS,),
    model=True,
    **LLAMA,
)
def gelu_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.gelu(x))


@bug(
    "sigmoid-for-silu",
    "the gate's activation is a sigmoid, not SiLU: GLU for SwiGLU",
    caught_by=(LOGITS,),
    model=True,
    **LLAMA,
)
def sigmoid_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: torch.sigmoid(x))


@bug(
    "gate-added",
    "the gate is added to the value instead of multiplying it",
    caught_by=(LOGITS, BENDS),
    model=True,
    **LLAMA,
)
def gate_added(model: Transformer) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.output(self.activation(self.gate(x)) + self.input(x))

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


# -- the ends


@bug(
    "embedding-scale-missing-doubled-rounded",
    "token embeddings are multiplied by √C, which neither GPT-2 nor Llama does",
    source="https://github.com/TensorAuto/OpenTau/pull/179",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def embedding_scaled(model: Transformer) -> None:
    def embed(self: Transformer, tokens: Tensor) -> Tensor:
        return Transformer.embed(self, tokens) * self.config.n_embd**0.5

    redefine(model, embed=embed)


@bug(
    "embedding-scale-after-positions",
    "tokens and positions together are multiplied by √C",
    caught_by=(LOGITS,),
    model=True,
    positions="learned",
    **GPT2,
)
def embedding_scaled_after_positions(model: Transformer) -> None:
    def add(self: Any, x: Tensor, positions: Tensor) -> Tensor:
        return type(self).__mro__[1].add(self, x, positions) * x.shape[-1] ** 0.5  # type: ignore[attr-defined]

    redefine(model.positions, add=add)


@bug(
    "logit-softcap-undeclared",
    "logits are capped, 30 tanh(x / 30), as in Gemma 2 but not in GPT-2 or Llama",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def logit_softcap_undeclared(model: Transformer) -> None:
    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        return 30 * torch.tanh(Transformer.forward(self, *args, **kwargs) / 30)

    redefine(model, forward=forward)


@bug(
    "logits-scaled",
    "logits are divided by √C, which neither GPT-2 nor Llama does",
    caught_by=(LOGITS,),
    model=True,
    **GPT2,
)
def logits_scaled(model: Transformer) -> None:
    def forward(self: Transformer, *args: Any, **kwargs: Any) -> Tensor:
        return Transformer.forward(self, *args, **kwargs) / self.config.n_embd**0.5

    redefine(model, forward=forward)
