"""Checks of parts: their findings, also in models unlike the reference, and the designs that must pass."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.messages import BUGS, Told, expect_told
from transformer_checks.checks.run.order import checks_in
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

BLOCK = "blocks.0.attention_norm"
FOUND: dict[str, Told] = {
    "norm-averages-over-the-past": (
        "norms_act_on_each_token_alone",
        BLOCK,
        ("[1, 6] of [3, 13]", "[1, 7]"),
        "norm-averages-over-the-past",
    ),
    "norm-divides-by-variance": (
        "norms_take_out_the_scale",
        BLOCK,
        ("0.25 times the output", "power -1"),
        "norm-divides-by-variance",
    ),
    "norm-divides-by-nothing": ("norms_take_out_the_scale", BLOCK, ("4 times the output",), "norm-divides-by-nothing"),
    "norm-adds-the-mean": ("norms_take_out_the_scale", BLOCK, ("-1 times the mean",), "norm-adds-the-mean"),
    "norm-epsilon-of-one": (
        "epsilon_does_not_rule_a_norm",
        BLOCK,
        ("about 1 added to the mean square",),
        "norm-epsilon-of-one",
    ),
    "norm-wrong-eps": ("epsilon_does_not_rule_a_norm", BLOCK, ("about 0.1 added",), "norm-wrong-eps"),
    "norm-gain-and-bias-swapped": (
        "gain_multiplies_and_bias_adds",
        BLOCK,
        ("weight (which starts at 1) is added", "the same for every input"),
        "norm-gain-and-bias-swapped",
    ),
    "norm-gain-added": ("gain_multiplies_and_bias_adds", BLOCK, ("weight", "multiplies nothing"), "norm-gain-added"),
    "rms-sum-not-mean": ("norms_are_what_they_are_called", BLOCK, ("RMSNorm", "0.177", "1/√32"), "rms-sum-not-mean"),
    "rms-subtracts-mean": ("norms_are_what_they_are_called", BLOCK, ("subtracts the mean",), "rms-subtracts-mean"),
    "mlp-no-activation": (
        "feed_forward_is_not_linear",
        "blocks.0.feed_forward",
        ("128 features to 32", "unchanged"),
        "mlp-no-activation",
    ),
    "gate-added": ("feed_forward_is_not_linear", "blocks.0.feed_forward", ("88 features to 32",), "gate-added"),
    "gelu-written-wrong": (
        "activations_are_what_they_are_called",
        "blocks.0.feed_forward.act",
        ("called NewGELU", "at 1 it gives", "should be 0.8413"),
        "gelu-written-wrong",
    ),
    "scale-after-softmax": (
        "attention_weights_sum_to_one",
        "blocks.0.attention",
        ("add up to 0.3536 over", "multiplied by 0.353553"),
        "scale-after-softmax",
    ),
    "softmax-over-heads-masked-after": (
        "attention_weights_sum_to_one",
        "blocks.0.attention",
        ("axis -3",),
        "softmax-over-heads-masked-after",
    ),
    "gqa-k-v-grouping-mismatch": (
        "heads_that_share_keys_share_values",
        "blocks.0.attention",
        ("keys are shared by heads 0+1, 2+3, values by heads 0+2, 1+3",),
        "gqa-k-v-grouping-mismatch",
    ),
    "gqa-groups-of-different-sizes": (
        "heads_that_share_keys_share_values",
        "blocks.0.attention",
        ("0+1+2, 3",),
        "gqa-groups-of-different-sizes",
    ),
    "attention-residual-missing": (
        "tokens_get_past_a_silent_part",
        "blocks.0.attention",
        ("every attention", "2 of 2"),
        "attention-residual-missing",
    ),
    "feed-forward-residual-missing": (
        "tokens_get_past_a_silent_part",
        "blocks.0.feed_forward",
        ("every feed-forward", "2 of 2"),
        "feed-forward-residual-missing",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("parts", bug, FOUND[bug])


# -- a model that is not ours: a norm, a feed-forward and attention's weights of any kind


def plain_weights(scores: Tensor, future: Tensor) -> Tensor:
    return scores.masked_fill(future, -torch.inf).softmax(-1)


class Toy(nn.Module):
    """Two blocks, with the parts to try: `norm(C)`, `feed_forward(C)` and `weights(scores, future)`."""

    def __init__(self, sizes: dict[str, int], norm: Callable, feed_forward: Callable, weights: Callable, **other: Any):
        super().__init__()
        C, T, V = sizes["n_embd"], sizes["block_size"], sizes["vocab_size"]
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=other.get("embedding", 0.02))
        block = other.get("block", ToyBlock)
        self.layers = nn.ModuleList(block(C, sizes["n_head"], norm, feed_forward, weights) for _ in range(2))
        self.ln_f, self.out = norm(C), nn.Linear(C, V)
        self.residual = other.get("residual", True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x, self.residual)
        return self.out(self.ln_f(x))


class ToyBlock(nn.Module):
    mix = staticmethod(torch.matmul)  # weights [B, H, T, T] and values [B, H, T, D] to [B, H, T, D]

    def __init__(self, C: int, H: int, norm: Callable, feed_forward: Callable, weights: Callable):
        super().__init__()
        self.ln1, self.ln2, self.mlp, self.weights, self.H = norm(C), norm(C), feed_forward(C), weights, H
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, residual: bool) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        mixed = self.mix(self.weights(q @ k.transpose(-2, -1) / (C // self.H) ** 0.5, future), v)
        x = x * residual + self.proj(mixed.transpose(1, 2).reshape(B, T, C))
        return x * residual + self.mlp(self.ln2(x))


def verdicts(**parts: Any) -> dict[str, Verdict]:
    """By check, the verdicts of the theme on a toy model with these parts."""
    given = dict(norm=nn.LayerNorm, feed_forward=gelu, weights=plain_weights) | parts
    subject = Subject("toy", SimpleNamespace(build_model=lambda **sizes: Toy(sizes, **given)), seed=5)
    return {check.__name__.removeprefix("check_"): judge(check, subject, {}) for check in checks_in("parts")}


def accused(found: dict[str, Verdict]) -> dict[str, str]:
    return {name: v.says for name, v in found.items() if v.outcome in ("failed", "error")}


class Own(nn.Module):
    """A custom norm with a gain and a bias."""

    def __init__(self, C: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def deviation(self, x: Tensor) -> Tensor:
        return (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def gelu(C: int) -> nn.Module:
    return nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))


# -- norms


class DyT(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (0.5 * x).tanh() * self.gamma + self.beta


class ScaleNorm(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.g = nn.Parameter(torch.tensor(float(C) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * F.normalize(x, dim=-1)


class BareNorm(nn.Module):
    def __init__(self, C: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x)


class OnePlusRMSNorm(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class RunningNorm(Own):
    """Divides by a running average: a constant in evaluation mode."""

    def __init__(self, C: int):
        super().__init__(C)
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.running_var.sqrt() * self.gamma + self.beta


class NamesExchanged(Own):
    """beta multiplies and starts at one: only the names are unusual."""

    def __init__(self, C: int):
        super().__init__(C)
        self.gamma, self.beta = self.beta, self.gamma

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.deviation(x) * self.beta + self.gamma


class NoNorm(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


def generous(C: int) -> nn.Module:
    return nn.LayerNorm(C, eps=1e-3)


def switched_off(C: int) -> nn.Module:
    return nn.Identity()


@pytest.mark.parametrize(
    "norm", [DyT, ScaleNorm, BareNorm, OnePlusRMSNorm, RunningNorm, NamesExchanged, NoNorm, generous, switched_off]
)
def test_unusual_norms_pass(norm):
    assert not accused(verdicts(norm=norm))


def test_tiny_embeddings_before_a_norm_pass():
    """As in RWKV at initialization: far below the root of a usual epsilon."""
    assert not accused(verdicts(norm=nn.LayerNorm, embedding=1e-4))


class SquaredNorm(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.deviation(x) ** 2 * self.gamma + self.beta


class LayerNormForgetsToDivide(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


class NormAddsGain(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.deviation(x) + self.gamma + self.beta


class NormStartsSwapped(Own):
    """The gain starts at zero and the bias at one."""

    def __init__(self, C: int):
        super().__init__(C)
        self.gamma, self.beta = self.beta, self.gamma

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / self.deviation(x) * self.gamma + self.beta


class NormOverRows(Own):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True) + 1e-5).sqrt() * self.gamma + self.beta


@pytest.mark.parametrize(
    "norm, check",
    [
        (SquaredNorm, "norms_take_out_the_scale"),
        (LayerNormForgetsToDivide, "norms_take_out_the_scale"),
        (NormAddsGain, "gain_multiplies_and_bias_adds"),
        (NormStartsSwapped, "gain_multiplies_and_bias_adds"),
        (NormOverRows, "norms_act_on_each_token_alone"),
        (lambda C: nn.LayerNorm(C, eps=0.5), "epsilon_does_not_rule_a_norm"),
    ],
)
def test_wrong_custom_norms_are_found(norm, check):
    found = verdicts(norm=norm)
    assert found[check].outcome == "failed", found[check].says
    assert found[check].where.module == "layers.0.ln1"


# -- feed-forwards


class InPlace(nn.Module):
    def __init__(self, C: int):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(C, 4 * C), nn.ReLU(inplace=True), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x)))

    def bend(self, x: Tensor) -> Tensor:
        return self.act(x)


class Convolved(nn.Module):
    """A feed-forward written as two convolutions of width 1, with `bend` between them."""

    def __init__(self, C: int, bend: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.up, self.down, self.bend = nn.Conv1d(C, 4 * C, 1), nn.Conv1d(4 * C, C, 1), bend

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Bilinear(nn.Module):
    """A gate without an activation is no linear map."""

    def __init__(self, C: int):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((C, 2 * C), (C, 2 * C), (2 * C, C)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x) * self.up(x))


def low_rank(C: int) -> nn.Module:
    return nn.Sequential(nn.Linear(C, 4), nn.Linear(4, C))


@pytest.mark.parametrize("feed_forward", [InPlace, Convolved, Bilinear, low_rank])
def test_nonlinear_and_low_rank_feed_forwards_pass(feed_forward):
    assert not accused(verdicts(feed_forward=feed_forward))


class TimesTwo(InPlace):
    def bend(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    "feed_forward, told",
    [
        (lambda C: nn.Sequential(nn.Linear(C, 4 * C), nn.Dropout(), nn.Linear(4 * C, C)), "unchanged"),
        (lambda C: nn.Sequential(nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.GELU()), "unchanged"),
        (lambda C: Convolved(C, lambda x: x), "unchanged"),
        (TimesTwo, "times 2"),
    ],
)
def test_two_matrices_in_a_row_are_found(feed_forward, told):
    verdict = verdicts(feed_forward=feed_forward)["feed_forward_is_not_linear"]
    assert verdict.outcome == "failed" and told in verdict.says and "128 features to 32" in verdict.says


class FastGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Swish(nn.Module):
    """With a learned slope, it need not equal the standard form."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


@pytest.mark.parametrize("activation, out", [(FastGELU, 4), (SquaredReLU, 4), (Swish, 4), (SwiGLU, 2)])
def test_activations_with_other_names_and_usual_forms_pass(activation, out):
    def feed_forward(C: int) -> nn.Module:
        return nn.Sequential(nn.Linear(C, 4 * C), activation(), nn.Linear(out * C, C))

    assert not accused(verdicts(feed_forward=feed_forward))


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(x)


def gelu_new(x: Tensor) -> Tensor:
    return x * torch.erf(x)


class ByFunction(InPlace):
    def bend(self, x: Tensor) -> Tensor:
        return gelu_new(x)


def test_a_wrong_function_is_found_where_it_is_written():
    verdict = verdicts(feed_forward=ByFunction)["activations_are_what_they_are_called"]
    assert verdict.outcome == "failed" and "gelu_new" in verdict.says
    assert verdict.where.line == gelu_new.__code__.co_firstlineno


def test_a_wrong_activation_is_found_by_its_name():
    found = verdicts(feed_forward=lambda C: nn.Sequential(nn.Linear(C, 4 * C), SiLU(), nn.Linear(4 * C, C)))
    assert set(accused(found)) == {"activations_are_what_they_are_called"}


# -- attention's weights


def with_sink(scores: Tensor, future: Tensor) -> Tensor:
    scores = scores.masked_fill(future, -torch.inf)
    return torch.cat((scores, torch.zeros_like(scores[..., :1])), dim=-1).softmax(-1)[..., :-1]


def sigmoid(scores: Tensor, future: Tensor) -> Tensor:
    return scores.masked_fill(future, -torch.inf).sigmoid()


def differential(scores: Tensor, future: Tensor) -> Tensor:
    one, other = (plain_weights(s, future) for s in (scores, scores.flip(1)))
    return one - 0.8 * other


def talking_heads(scores: Tensor, future: Tensor) -> Tensor:
    return torch.einsum("bhts,hg->bgts", plain_weights(scores, future), torch.eye(4).to(scores) + 0.1)


def by_keys_first(scores: Tensor, future: Tensor) -> Tensor:
    return scores.masked_fill(future, -torch.inf).transpose(-2, -1).softmax(-2).transpose(-2, -1)


@pytest.mark.parametrize("weights", [with_sink, sigmoid, differential, talking_heads, by_keys_first])
def test_unusual_attention_passes(weights):
    assert not accused(verdicts(weights=weights))


def test_scaled_attention_weights_are_found():
    found = verdicts(weights=lambda scores, future: plain_weights(scores, future) / 8)
    assert set(accused(found)) == {"attention_weights_sum_to_one"}
    assert "add up to 0.125" in found["attention_weights_sum_to_one"].says


MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flattened": lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).view_as(v),
    "einsum with dots": lambda w, v: torch.einsum("...ts,...sd->...td", w, v),
    "einsum of values that come first": lambda w, v: torch.einsum("bhsd,bhts->bhtd", v, w),
    "heads in groups": lambda w, v: (w.unflatten(1, (2, -1)) @ v.unflatten(1, (2, -1))).flatten(1, 2),
    "rows of all heads": lambda w, v: (w.flatten(1, 2) @ v[:, 0]).view_as(v),  # they share their values
    "both transposed": lambda w, v: (v.mT @ w.mT).mT,
}


def by_hand(scores: Tensor, future: Tensor) -> Tensor:
    shown = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(future, 0.0)
    return shown / shown.sum(-1, keepdim=True)


@pytest.mark.parametrize("weights", [plain_weights, by_hand])
@pytest.mark.parametrize("spelling", MIXES)
def test_attention_weights_are_found_in_every_spelling(spelling, weights):
    class Block(ToyBlock):
        mix = staticmethod(MIXES[spelling])

    right = verdicts(weights=weights, block=Block)
    wrong = verdicts(weights=lambda scores, future: weights(scores, future) * 0.7, block=Block)
    assert not accused(right) and right["attention_weights_sum_to_one"].outcome == "passed"
    assert "add up to 0.7" in accused(wrong)["attention_weights_sum_to_one"]


# -- the residual stream


class WideHeads(nn.Module):
    """Heads that together are wider than the model, with queries computed last."""

    def __init__(self, C: int, H: int, shared: bool):
        super().__init__()
        self.H, self.D = H, C
        self.values = nn.Linear(C, C if shared else H * C)
        self.keys, self.queries = nn.Linear(C, C if shared else H * C), nn.Linear(C, H * C)
        self.out = nn.Linear(H * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        v, k, q = (f(x).view(B, T, -1, self.D).transpose(1, 2) for f in (self.values, self.keys, self.queries))
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        mixed = plain_weights(q @ k.transpose(-2, -1) / self.D**0.5, future) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shared", [False, True])
def test_wide_heads_are_no_feed_forward(shared):
    class WideBlock(ToyBlock):
        def __init__(self, C: int, H: int, norm: Callable, feed_forward: Callable, weights: Callable):
            super().__init__(C, H, norm, feed_forward, weights)
            self.attention = WideHeads(C, H, shared)
            del self.qkv, self.proj

        def forward(self, x: Tensor, residual: bool) -> Tensor:
            x = x + self.attention(self.ln1(x))
            return x + self.mlp(self.ln2(x))

    found = verdicts(block=WideBlock)
    assert not accused(found)
    assert found["feed_forward_is_not_linear"].evidence["feed_forwards"] == 2
    assert len(found["tokens_get_past_a_silent_part"].evidence["changes"]) == 2


def test_a_residual_taken_before_attention_is_found():
    verdict = judge(
        {c.__name__: c for c in checks_in("parts")}["check_tokens_get_past_a_silent_part"],
        BUGS["residual-from-the-blocks-input"].subject(seed=3),
        {},
    )
    assert verdict.outcome == "failed" and "what attention computes is not added" in verdict.says
    assert "residual-from-the-blocks-input" in verdict.likely


def test_a_model_without_residuals_gets_remarks_and_passes():
    found = verdicts(residual=False)
    assert not accused(found)
    assert len(found["tokens_get_past_a_silent_part"].remarks) == 2
