"""Wrong mixtures of experts: the weights of a token's experts, the choice, the biases, what balances them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...transformer.model import Transformer
from ..check_causality import check_future_cannot_change_past
from ..check_experts import (
    check_a_raised_score_gives_its_expert_weight,
    check_an_experts_bias_is_weighted_with_it,
    check_expert_weights_are_shares,
    check_other_tokens_leave_a_tokens_weights_alone,
    check_what_an_expert_computes_reaches_the_output,
    check_what_balances_experts_has_a_gradient,
)
from . import bug
from .damage import redefine
from .designs import CHOSEN, BalancedTransformer, Experts, StackedExperts, balanced_experts, experts, stacked_experts


def mixtures_with(model: Transformer, **methods: Any) -> None:
    for module in list(model.modules()):
        if isinstance(module, Experts):
            redefine(module, **methods)


@bug(
    "the weights of the chosen experts are divided by their norm over all tokens of the batch",
    check_other_tokens_leave_a_tokens_weights_alone,
    check_future_cannot_change_past,
    of=experts,
)
def router_normalised_over_tokens(model: Transformer) -> None:
    mixtures_with(model, normalised=lambda self, weights: weights / weights.norm(dim=0, keepdim=True))


@bug(
    "the router's softmax is over the tokens instead of the experts",
    check_other_tokens_leave_a_tokens_weights_alone,
    check_future_cannot_change_past,
    of=stacked_experts,
)
def router_softmax_over_tokens(model: Transformer) -> None:
    mixtures_with(model, probabilities=lambda self, scores: scores.softmax(0), normalised=lambda self, weights: weights)


@bug(
    "the weights of a token's experts are sorted the other way than the experts: each gets the weight of another",
    check_a_raised_score_gives_its_expert_weight,
    of=experts,
)
def expert_weights_swapped(model: Transformer) -> None:
    mixtures_with(model, normalised=lambda self, weights: (weights / weights.sum(-1, keepdim=True)).flip(-1))


@bug(
    "the router takes the experts with the lowest probability",
    check_a_raised_score_gives_its_expert_weight,
    of=stacked_experts,
)
def least_likely_experts(model: Transformer) -> None:
    def choose(self: Experts, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.probabilities(scores).topk(CHOSEN, dim=-1, largest=False)
        return self.normalised(weights), chosen

    mixtures_with(model, choose=choose)


@bug(
    "the output of a token's second expert overwrites that of the first instead of being added to it",
    check_what_an_expert_computes_reaches_the_output,
    of=experts,
)
def expert_outputs_overwritten(model: Transformer) -> None:
    def mixed(self: Experts, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_copy(0, token, weights[token, slot, None] * expert(flat[token]))
        return out

    mixtures_with(model, mixed=mixed)


@bug(
    "all experts of a token are weighted by the weight of the first",
    check_expert_weights_are_shares,
    of=experts,
)
def weight_of_the_first_expert(model: Transformer) -> None:
    def normalised(self: Experts, weights: Tensor) -> Tensor:
        return (weights / weights.sum(-1, keepdim=True))[:, :1].expand_as(weights)

    mixtures_with(model, normalised=normalised)


@bug("the router's raw scores, also negative ones, weight the experts", check_expert_weights_are_shares, of=experts)
def raw_scores_as_weights(model: Transformer) -> None:
    mixtures_with(model, probabilities=lambda self, scores: scores, normalised=lambda self, weights: weights)


@bug(
    "the weights of the chosen experts are divided by their norm instead of their sum",
    check_expert_weights_are_shares,
    of=stacked_experts,
)
def router_normalised_by_its_norm(model: Transformer) -> None:
    mixtures_with(model, normalised=lambda self, weights: weights / weights.norm(dim=-1, keepdim=True))


@bug(
    "the bias of an expert is added in full, whatever the expert's weight",
    check_an_experts_bias_is_weighted_with_it,
    of=stacked_experts,
)
def expert_bias_not_weighted(model: Transformer) -> None:
    def weighted(self: StackedExperts, out: Tensor, share: Tensor) -> Tensor:
        return torch.einsum("nec,ne->nc", out, share) + (share > 0).to(out) @ self.b2

    mixtures_with(model, weighted=weighted)


@bug(
    "the loss that balances the experts is made of counts alone, and has no gradient",
    check_what_balances_experts_has_a_gradient,
    of=balanced_experts,
)
def balance_loss_detached(model: Transformer) -> None:
    def probability(self: BalancedTransformer, scores: Tensor) -> Tensor:
        return scores.softmax(-1).mean(0).detach()

    redefine(model, probability=probability)
