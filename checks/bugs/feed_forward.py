"""Wrong feed-forwards: the activation, the gate, the biases."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...transformer.model import GeluFeedForward, SwigluFeedForward, Transformer
from ..check_parts import check_activations_are_what_they_are_called, check_feed_forward_is_not_linear
from ..check_spec import check_logits_agree
from . import bug
from .damage import GELU, GPT2, LLAMA, blocks, redefine
from .designs import changed

# -- where the activation is


@bug(
    "the feed-forward has no activation: two linear layers in a row",
    check_logits_agree,
    check_feed_forward_is_not_linear,
    source="https://github.com/leffff/graphormer-pyg/issues/23",
    **GELU,
)
def mlp_no_activation(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x)


@bug(
    "the activation comes after the second linear layer instead of between the two",
    check_logits_agree,
    check_feed_forward_is_not_linear,
    source="https://github.com/goruck/nilm/issues/1",
    **GELU,
)
def activation_after_second_linear(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, forward=lambda self, x: self.activation(self.output(self.input(x))))


@bug("the activation is applied after the second linear layer too", check_logits_agree, **GELU)
def activation_after_both(model: Transformer) -> None:
    for block in blocks(model):
        redefine(
            block.feed_forward, forward=lambda self, x: self.activation(self.output(self.activation(self.input(x))))
        )


# -- which activation


@bug(
    "GELU is approximated by x σ(1.702 x), neither GPT-2's tanh form nor the exact one",
    check_logits_agree,
    source="https://github.com/huggingface/transformers/pull/29402",
    **GELU,
)
def gelu_variant(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x * torch.sigmoid(1.702 * x))


class NewGELU(nn.Module):
    """The tanh form written out, as many have it from before PyTorch had it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + self.factor() * x**3)).tanh())

    def factor(self) -> float:
        return 0.044715


class WrittenOut(GeluFeedForward):
    act: NewGELU

    def activation(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x)
        return out


def written_out(**config: Any) -> SimpleNamespace:
    """The reference with its activation as a module of its own."""

    def change(model: Transformer) -> None:
        for module in model.modules():
            if isinstance(module, GeluFeedForward):
                module.__class__ = WrittenOut
                module.act = NewGELU()

    return changed(change, **config)


@bug("hand-written GELU without its factor 0.044715", check_activations_are_what_they_are_called, of=written_out)
def gelu_written_wrong(model: Transformer) -> None:
    class WithoutFactor(NewGELU):
        def factor(self) -> float:
            return 1.0

    WithoutFactor.__name__ = NewGELU.__name__  # the name by which it is known
    for module in model.modules():
        if isinstance(module, NewGELU):
            module.__class__ = WithoutFactor


@bug("the feed-forward uses ReLU instead of GELU", check_logits_agree, **GELU)
def relu_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x))


@bug("the feed-forward uses SiLU instead of GELU", check_logits_agree, **GELU)
def silu_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.silu(x))


@bug("the feed-forward uses squared ReLU instead of GELU", check_logits_agree, **GELU)
def relu_squared_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x).square())


@bug("the feed-forward uses tanh instead of GELU", check_logits_agree, **GELU)
def tanh_for_gelu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x.tanh())


# -- the gate


@bug("the gate uses GELU instead of SiLU: GEGLU, not SwiGLU", check_logits_agree, **LLAMA)
def gelu_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.gelu(x))


@bug("the gate uses the tanh form of GELU instead of SiLU", check_logits_agree, **LLAMA)
def gelu_tanh_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.gelu(x, approximate="tanh"))


@bug("the gate uses a sigmoid instead of SiLU: GLU, not SwiGLU", check_logits_agree, **LLAMA)
def sigmoid_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: torch.sigmoid(x))


@bug("the gate uses ReLU instead of SiLU: ReGLU, not SwiGLU", check_logits_agree, **LLAMA)
def relu_for_silu(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: F.relu(x))


@bug("the gate has no activation: bilinear, not SwiGLU", check_logits_agree, **LLAMA)
def gate_without_activation(model: Transformer) -> None:
    for block in blocks(model):
        redefine(block.feed_forward, activation=lambda self, x: x)


@bug("the activation is applied to gate times value instead of the gate", check_logits_agree, **LLAMA)
def activation_of_the_product(model: Transformer) -> None:
    def forward(self: SwigluFeedForward, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.gate(x) * self.input(x)))
        return out

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


@bug("the activation is applied to the value as well as the gate", check_logits_agree, **LLAMA)
def activation_of_both(model: Transformer) -> None:
    def forward(self: SwigluFeedForward, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.gate(x)) * self.activation(self.input(x)))
        return out

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


@bug("the gate is added to the value, not multiplied", check_logits_agree, check_feed_forward_is_not_linear, **LLAMA)
def gate_added(model: Transformer) -> None:
    def forward(self: SwigluFeedForward, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.activation(self.gate(x)) + self.input(x))
        return out

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)


# -- biases


@bug("the feed-forward has biases and does not add them", check_logits_agree, **GPT2)
def bias_not_added(model: Transformer) -> None:
    def forward(self: GeluFeedForward, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.input.weight)), self.output.weight)

    for block in blocks(model):
        redefine(block.feed_forward, forward=forward)
