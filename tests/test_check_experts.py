"""Checks of experts: their findings, and mixtures in other spellings, which must be met and must pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs.designs import BalancedTransformer, changed
from transformer_checks.checks.check_causality import check_future_cannot_change_past
from transformer_checks.checks.check_loss import check_the_loss_trains_what_makes_the_logits
from transformer_checks.checks.check_masking import check_rows_do_not_touch
from transformer_checks.checks.check_paths import check_rows_do_not_touch_on_any_path
from transformer_checks.checks.expect import NotApplicable
from transformer_checks.checks.loss.returned import answers, untrained
from transformer_checks.checks.probes.experts import mixtures, used
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

LAYER = "blocks.0.feed_forward"
FOUND: dict[str, Told] = {
    "router-normalised-over-tokens": (
        "other_tokens_leave_a_tokens_weights_alone",
        LAYER,
        ("score of token 0", "of 17 other tokens", "should be 1"),
        "router-normalised-over-tokens",
    ),
    "router-softmax-over-tokens": (
        "other_tokens_leave_a_tokens_weights_alone",
        LAYER,
        ("score of token 0", "of 17 other tokens"),
        "router-softmax-over-tokens",
    ),
    "expert-weights-swapped": (
        "a_raised_score_gives_its_expert_weight",
        LAYER,
        ("has no part", "does instead", "of 54 trials"),
        "expert-weights-swapped",
    ),
    "least-likely-experts": (
        "a_raised_score_gives_its_expert_weight",
        LAYER,
        ("has no part", "54 of 54 trials"),
        "least-likely-experts",
    ),
    "expert-outputs-overwritten": (
        "what_an_expert_computes_reaches_the_output",
        LAYER,
        ("18 of 36 outputs", "each of 18 tokens", "a part of 1 of them"),
        "expert-outputs-overwritten",
    ),
    "weight-of-the-first-expert": (
        "expert_weights_are_shares",
        LAYER,
        ("have one weight", "of token 0 both count"),
        "weight-of-the-first-expert",
    ),
    "raw-scores-as-weights": (
        "expert_weights_are_shares",
        LAYER,
        ("are negative", "score is -"),
        "raw-scores-as-weights",
    ),
    "router-normalised-by-its-norm": (
        "expert_weights_are_shares",
        LAYER,
        ("add up to 1.4", "at most 1"),
        "router-normalised-by-its-norm",
    ),
    "expert-bias-not-weighted": (
        "an_experts_bias_is_weighted_with_it",
        LAYER,
        ("the bias b2", "its bias 1 times"),
        "expert-bias-not-weighted",
    ),
    "balance-loss-detached": (
        "what_balances_experts_has_a_gradient",
        LAYER,
        ("has no gradient",),
        "balance-loss-detached",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("experts", bug, FOUND[bug])


# -- mixtures in other spellings

E = 4


def expert(C: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, 2 * C, bias=bias), nn.SiLU(), nn.Linear(2 * C, C, bias=bias))


class Layer(nn.Module):
    """Experts as modules; `weights(scores)` [.., E] is what each counts, mostly zero."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(C, E), nn.ModuleList(expert(C) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        share = self.weights(self.gate(x))
        return sum(share[..., e, None] * one(x) for e, one in enumerate(self.experts))

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


def sparse(scores: Tensor, k: int, top: Tensor | None = None) -> Tensor:
    """Scores of the top k, zero elsewhere."""
    chosen = (scores if top is None else top).topk(k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))


class Switch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, one in enumerate(self.experts):
            out[chosen == e] = one(x[chosen == e])
        return weight[..., None] * out


class Sigmoids(Layer):
    """Chosen by biased scores, weighted by unbiased ones, times a factor, with a shared expert (DeepSeek-V3)."""

    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.shared = expert(C)
        self.register_buffer("correction", torch.linspace(-0.1, 0.1, E))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + super().forward(x)

    def weights(self, scores: Tensor) -> Tensor:
        s = scores.sigmoid()
        share = sparse(s, 2, top=s + self.correction)
        return 2.5 * share / (share.sum(-1, keepdim=True) + 1e-20)


class PlainSigmoids(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        return sparse(scores.sigmoid(), 2)


class Rectified(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        return F.relu(scores)


class SoftmaxTwice(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        share = sparse(scores.softmax(-1), 2)
        return torch.where(share > 0, share, -torch.inf).softmax(-1)


class SoftmaxOfTanh(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        return scores.tanh().softmax(-1)


class SoftmaxOfChosen(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -torch.inf)
        top = scores.topk(2, dim=-1)
        return kept.scatter(-1, top.indices, top.values).softmax(-1)


class OtherOrder(Layer):
    """The router's columns belong to experts of other numbers: as good a mixture as any."""

    def weights(self, scores: Tensor) -> Tensor:
        return sparse(scores.softmax(-1), 2).roll(1, -1)


class Outvoted(Layer):
    """One expert of each token, which strong biases of the choice may decide against its score."""

    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.bias = nn.Parameter(torch.linspace(-1, 1, E))

    def weights(self, scores: Tensor) -> Tensor:
        share = sparse(scores.sigmoid(), 1, top=scores.sigmoid() + self.bias / 10)
        return share / share.sum(-1, keepdim=True)


class Averaged(Layer):
    """The mean of the two best: their scores decide which, not how much."""

    def weights(self, scores: Tensor) -> Tensor:
        return (sparse(scores.softmax(-1), 2) > 0).to(scores) / 2


class InputWeighted(Layer):
    """The weight multiplies the expert's input, as in Llama 4."""

    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.experts = nn.ModuleList(expert(C, bias=False) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        share = sparse(self.gate(x), 1)
        share = torch.where(share != 0, share.sigmoid(), 0)
        return sum(one(share[..., e, None] * x) for e, one in enumerate(self.experts))


class Capacity(Layer):
    """An expert takes six tokens, the first ones of the batch; the others pass it by."""

    def weights(self, scores: Tensor) -> Tensor:
        share = sparse(scores.softmax(-1), 2)
        rank = (share > 0).flatten(0, -2).cumsum(0).view_as(share)
        return torch.where(rank <= 6, share, 0)


class ExpertsChoose(Layer):
    """Each expert takes the six tokens that score it highest."""

    def weights(self, scores: Tensor) -> Tensor:
        share = scores.softmax(-1).flatten(0, -2)
        return sparse(share.T, 6).T.reshape(scores.shape)


class DeepRouter(Layer):
    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.gate = nn.Sequential(nn.Linear(C, 7), nn.Tanh(), nn.Linear(7, E))

    def weights(self, scores: Tensor) -> Tensor:
        return sparse((scores / 0.5).softmax(-1), 1)


class Named(Layer):
    def __init__(self, C: int) -> None:
        super().__init__(C)
        self.experts = nn.ModuleDict({f"expert_{e}": expert(C) for e in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        share = sparse(self.gate(flat).float().softmax(-1), 2).to(x)
        out = torch.zeros_like(flat)
        for e in range(E):
            rows = share[:, e].nonzero()[:, 0]
            if len(rows):
                out.index_add_(0, rows, share[rows, e, None] * self.experts[f"expert_{e}"](flat[rows]))
        return out.view_as(x)


class Stacked(nn.Module):
    """All weights, the router's among them, are tensors of one module; gated experts without biases."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(C, E) * C**-0.5)
        for name, shape in dict(w1=(C, 2 * C), w3=(C, 2 * C), w2=(2 * C, C)).items():
            setattr(self, name, nn.Parameter(torch.randn(E, *shape) * C**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        share = sparse(self.scores(x).softmax(-1), 2)
        hidden = F.silu(torch.einsum("btc,ecf->btef", x, self.w1)) * torch.einsum("btc,ecf->btef", x, self.w3)
        return torch.einsum("bte,btef,efc->btc", share / share.sum(-1, keepdim=True), hidden, self.w2)

    def scores(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,ce->bte", x, self.router)


class Batched(Stacked):
    """Tokens are gathered for each expert and go through one bmm."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        share = sparse((flat @ self.router).softmax(-1), 1)  # [N, E]
        rows = flat.expand(E, *flat.shape) * (share > 0).T[..., None]
        hidden = F.silu(torch.bmm(rows, self.w1)) * torch.bmm(rows, self.w3)
        return (torch.bmm(hidden, self.w2) * share.T[..., None]).sum(0).view_as(x)


MET = (
    Layer, Switch, Sigmoids, PlainSigmoids, Rectified, SoftmaxTwice, SoftmaxOfChosen, OtherOrder, Outvoted, Averaged,
    InputWeighted, Capacity, DeepRouter, Named, Stacked, Batched,
)  # fmt: skip


def with_layer(kind: Callable[[int], nn.Module], **declared: int) -> Subject:
    def change(model):
        for block in model.blocks:
            block.feed_forward = kind(model.config.n_embd)

    return Subject(kind.__name__, changed(change), **declared)


def verdicts(subject: Subject) -> dict[str, Verdict]:
    return {check.__name__.removeprefix("check_"): judge(check, subject, {}) for check in checks_in("experts")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", MET)
def test_a_mixture_in_any_spelling_is_met_and_passes(kind, seed):
    subject = with_layer(kind, seed=seed)
    try:
        first, last = mixtures(subject)
    except NotApplicable as reason:  # which pytest would take for a skip
        pytest.fail(str(reason))
    assert (first.where.module, last.where.module) == (LAYER, "blocks.1.feed_forward")
    assert len(first.experts) == E
    assert bool(used(first.parts).any(0).double().mean() > 0.3)
    found = verdicts(subject)
    assert {name: v.says for name, v in found.items() if v.outcome not in ("passed", "not_applicable")} == {}
    assert found["expert_weights_are_shares"].outcome == "passed"


def test_tokens_that_compete_for_experts_are_told_and_not_accused():
    """Experts that choose their tokens: whether one is left out depends on the others, which causality judges."""
    told: list[str] = []
    for seed in range(8):
        found = verdicts(with_layer(ExpertsChoose, seed=seed))
        assert {v.outcome for v in found.values()} == {"passed", "not_applicable"}
        told += found["other_tokens_leave_a_tokens_weights_alone"].remarks
    assert told and all("compete for places" in remark for remark in told)


def test_columns_of_another_order_are_told_and_not_accused():
    found = verdicts(with_layer(OtherOrder))["a_raised_score_gives_its_expert_weight"]
    assert found.outcome == "passed"
    assert "0 to expert 1, 1 to expert 2" in found.remarks[0]


class Heads(nn.Module):
    """Equal modules that all work for every token, beside a matrix with as many columns."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.parts, self.gate = nn.ModuleList(expert(C) for _ in range(E)), nn.Linear(C, E)

    def forward(self, x: Tensor) -> Tensor:
        gates = 1 + self.gate(x).tanh()
        return sum(gates[..., e, None] * part(x) for e, part in enumerate(self.parts))


class TimeFirst(Stacked):
    """The router reads the tokens in another order than the experts: its rows are not those of the output."""

    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x.transpose(0, 1)).transpose(0, 1)


class Single(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.only = expert(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


@pytest.mark.parametrize("kind", [Heads, Single, SoftmaxOfTanh, TimeFirst])
def test_what_is_no_mixture_is_not_judged(kind):
    found = verdicts(with_layer(kind))
    assert {v.outcome for v in found.values()} == {"not_applicable"}


# -- mistakes in these other spellings


class SwitchOverTokens(Switch):
    """The first line of many a report: weights [tokens] are normalised along their only axis."""

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        weight = weight / weight.flatten().norm()
        out = torch.zeros_like(x)
        for e, one in enumerate(self.experts):
            out[chosen == e] = one(x[chosen == e])
        return weight[..., None] * out


class WeightsOfAnotherToken(Layer):
    def weights(self, scores: Tensor) -> Tensor:
        share = sparse(scores.softmax(-1), 2)
        return torch.where(share > 0, share.flatten(0, 1).roll(1, 0).view_as(share).sum(-1, keepdim=True), 0)


class SoftmaxOverTime(Stacked):
    def scores(self, x: Tensor) -> Tensor:
        return super().scores(x).log_softmax(dim=1)


class RawWeights(Stacked):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        share = sparse(scores, 2)
        hidden = F.silu(torch.einsum("btc,ecf->btef", x, self.w1)) * torch.einsum("btc,ecf->btef", x, self.w3)
        return torch.einsum("bte,btef,efc->btc", share, hidden, self.w2)


class SlotsSwapped(Layer):
    """Indices are sorted, so that each slot's weight goes to another expert."""

    def weights(self, scores: Tensor) -> Tensor:
        values, chosen = scores.softmax(-1).topk(2, dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen.flip(-1), values)


class IndicesSorted(Layer):
    """The experts are sorted by their numbers, the weights by their size: right for half of the tokens."""

    def weights(self, scores: Tensor) -> Tensor:
        values, chosen = scores.softmax(-1).topk(2, dim=-1)
        return torch.zeros_like(scores).scatter(-1, chosen.sort(-1).values, values)


WRONG = {
    IndicesSorted: "a_raised_score_gives_its_expert_weight",
    SwitchOverTokens: "other_tokens_leave_a_tokens_weights_alone",
    WeightsOfAnotherToken: "other_tokens_leave_a_tokens_weights_alone",
    SoftmaxOverTime: "other_tokens_leave_a_tokens_weights_alone",
    RawWeights: "expert_weights_are_shares",
    SlotsSwapped: "a_raised_score_gives_its_expert_weight",
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_in_another_spelling_is_caught(kind, seed):
    found = verdicts(with_layer(kind, seed=seed))[WRONG[kind]]
    assert found.outcome == "failed"
    assert found.where is not None and found.where.module == LAYER


# -- what the other themes say of mixtures


@pytest.mark.parametrize("check", [check_rows_do_not_touch, check_rows_do_not_touch_on_any_path])
def test_experts_that_fill_up_are_no_rows_that_touch(check):
    """Whether another row's token has left room in an expert is part of the design (Fedus et al. 2021)."""
    found = judge(check, with_layer(Capacity, seed=1), {})
    assert found.outcome == "not_applicable"
    assert "experts of blocks.0.feed_forward take a limited number" in found.says


class CapacityByProbability(Layer):
    """An expert takes its six likeliest tokens: a later one may push an earlier one out."""

    def weights(self, scores: Tensor) -> Tensor:
        share = sparse(scores.softmax(-1), 2)
        flat = share.flatten(0, -2)
        return torch.where(flat.argsort(0, descending=True).argsort(0) < 6, flat, 0).view_as(share)


def test_experts_that_fill_up_by_probability_are_no_sight_of_the_future():
    found = judge(check_future_cannot_change_past, with_layer(CapacityByProbability), {})
    assert found.outcome == "not_applicable"
    assert "take a limited number" in found.says


@pytest.mark.parametrize("check", [check_rows_do_not_touch, check_future_cannot_change_past])
def test_a_mistake_of_the_router_is_still_a_leak(check):
    found = judge(check, with_layer(SwitchOverTokens), {})
    assert found.outcome == "failed"
    assert found.where is not None and found.where.module == LAYER
    assert found.likely[0] == "router-normalised-over-tokens"


class ShiftedTransformer(BalancedTransformer):
    def taught(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def test_an_expert_of_the_last_token_alone_is_not_called_untrained():
    """The last token's logits have no target: an expert that serves it alone gets no gradient from that batch."""

    def change(model):
        model.__class__ = ShiftedTransformer
        for block in model.blocks:
            block.feed_forward = Switch(model.config.n_embd)

    idle = 0
    for seed in range(12):
        subject = Subject("shifted", changed(change), seed=seed)
        idle += bool(untrained(answers(subject)))
        assert judge(check_the_loss_trains_what_makes_the_logits, subject, {}).outcome == "passed"
    assert idle  # or this tests nothing
