"""Findings of the initialization checks: the loss, the layers, the seed, the depth, the sizes of weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.check_initialization import (
    check_depth_does_not_blow_up,
    check_gains_do_not_start_around_zero,
    check_loss_starts_near_uniform,
    check_matrices_start_centred,
    check_projections_keep_the_size,
    check_tokens_matter_from_the_start,
)
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND: dict[str, Told] = {
    "init-std-one": ("loss_starts_near_uniform", None, ("27.", "ln 17 = 2.83"), "init-std-one"),
    "logits-multiplied-by-width": (
        "loss_starts_near_uniform",
        None,
        ("is 13", "ln 17 = 2.83"),
        "logits-multiplied-by-width",
    ),
    "layers-identical-at-init": (
        "layers_start_different",
        "blocks.1.attention.qkv",
        ("blocks.1.attention.qkv.weight", "weights of blocks.0.attention.qkv.weight"),
        "layers-identical-at-init",
    ),
    "every-layer-seeded-alike": (
        "seed_decides_the_weights",
        "every_layer_seeded_alike",
        ("blocks.0.attention.qkv.weight", "seeds the global"),
        "every-layer-seeded-alike",
    ),
    "constructor-seeds": ("seed_decides_the_weights", "seeded", ("embedding.weight",), "constructor-seeds"),
    "weights-from-their-own-generator": (
        "seed_decides_the_weights",
        None,
        ("from the same seed differ in embedding.weight",),
        "weights-from-their-own-generator",
    ),
    "init-mean-one": (
        "matrices_start_centred",
        "blocks.0.feed_forward.output",
        (
            "feed_forward.output.weight starts with a mean of 1, ",
            "50.9 times its standard deviation of 0.0196",
            "The same holds for 1 more",
        ),
        "init-mean-one",
    ),
    "gains-redrawn-with-the-matrices": (
        "gains_do_not_start_around_zero",
        "blocks.0.attention_norm",
        ("the gain blocks.0.attention_norm.weight", "of 32 below zero", "The same holds for 4 more"),
        "gains-redrawn-with-the-matrices",
    ),
    "init-scale-inverted": (
        "projections_keep_the_size",
        "blocks.0.attention.output",
        ("blocks.0.attention.output.weight", "times as large in a model of width 256", "standard deviation is 99.7)"),
        "init-scale-inverted",
    ),
    "init-not-for-the-width": (
        "projections_keep_the_size",
        "blocks.0.feed_forward.output",
        ("blocks.0.feed_forward.output.weight", "in a model of width 256", "standard deviation is 1)"),
        "init-not-for-the-width",
    ),
    "init-constant": (
        "tokens_matter_from_the_start",
        None,
        ("the same for all tokens", "after 3 steps"),
        "init-constant",
    ),
    "init-zero": ("tokens_matter_from_the_start", None, ("the same for all tokens", "after 3 steps"), "init-zero"),
    "residual-doubled": ("depth_does_not_blow_up", "blocks.15", ("from layer 8 to layer 16",), "residual-doubled"),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("initialization", bug, FOUND[bug])


def test_one_layer_with_larger_weights_is_no_growth_with_depth():
    def change(model):
        with torch.no_grad():
            model.blocks[-1].feed_forward.output.weight.mul_(30)

    found = judge(check_depth_does_not_blow_up, Subject("larger", changed(change)), {})
    assert found.outcome == "passed", found.says


STARTS = (
    check_matrices_start_centred,
    check_gains_do_not_start_around_zero,
    check_projections_keep_the_size,
    check_tokens_matter_from_the_start,
)


class OnePlus(nn.LayerNorm):
    """Gains stored minus one (Gemma): drawn around zero, they are near one."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape) * (1 + self.weight)


class Adapted(nn.Linear):
    """A low-rank adaptation (Hu et al. 2021): its first matrix is large, its second starts at zero."""

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class InUnits(nn.Linear):
    """Weights of unit size, and an output divided by the root of the width."""

    def forward(self, x):
        return super().forward(x) / self.in_features**0.5


class Cosine(nn.Linear):
    """Only the directions of its weights matter."""

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight, dim=-1), self.bias)


def one_plus(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = OnePlus
            nn.init.normal_(module.weight, std=0.02)


def adapted(model):
    for block in model.blocks:
        linear = block.feed_forward.output
        linear.__class__ = Adapted
        linear.down = nn.Linear(linear.in_features, 4, bias=False)
        linear.up = nn.Linear(4, linear.out_features, bias=False)
        nn.init.normal_(linear.down.weight)
        nn.init.zeros_(linear.up.weight)


def of_class(kind):
    def change(model):
        for block in model.blocks:
            block.feed_forward.output.__class__ = kind
            nn.init.normal_(block.feed_forward.output.weight)

    return change


def jittered_gains(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)


def random_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)


def last_norm_from_zero(model):
    nn.init.zeros_(model.norm.weight)


def to_be_loaded(model):
    """As from torch.empty: zeros, unless uninitialized memory is marked."""
    empty = torch.empty(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.where(empty.isnan(), empty, 0.0).expand_as(parameter))


def adapters_of_frozen_weights(model):
    for parameter in model.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)
    adapted(model)
    nn.init.ones_(model.norm.weight)


LEGITIMATE = {
    "weights to be loaded": to_be_loaded,
    "adapters of frozen weights": adapters_of_frozen_weights,
    "gains stored less one": one_plus,
    "a low-rank adaptation": adapted,
    "weights of unit size": of_class(InUnits),
    "weights by their direction": of_class(Cosine),
    "gains drawn around one": jittered_gains,
    "random biases": random_biases,
    "a last norm that starts at zero": last_norm_from_zero,
}


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_unusual_initializations_pass(name, seed):
    subject = Subject(name, changed(LEGITIMATE[name]), seed=seed)
    accused = [v.says for check in STARTS if (v := judge(check, subject, {})).outcome in ("failed", "error")]
    assert not accused


def test_a_model_that_starts_at_zero_is_judged_after_some_steps():
    found = judge(check_tokens_matter_from_the_start, Subject("zero", changed(last_norm_from_zero)), {})
    assert found.outcome == "not_applicable" and "3 steps later" in found.says


def test_weights_between_zero_and_one_only_get_advice():
    def change(model):
        nn.init.uniform_(model.blocks[0].feed_forward.output.weight)

    found = judge(check_matrices_start_centred, Subject("uniform", changed(change)), {})
    assert found.outcome == "passed" and "1.7" in found.remarks[0] and "torch.rand" in found.remarks[0]


def test_gains_of_a_custom_norm_are_recognized():
    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.scale, self.shift = nn.Parameter(0.1 * torch.randn(width)), nn.Parameter(torch.randn(width))

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.scale + self.shift

    def change(model):
        model.norm = Own(model.config.n_embd)

    found = judge(check_gains_do_not_start_around_zero, Subject("own", changed(change)), {})
    assert found.outcome == "failed" and found.evidence["gains"] == ["norm.scale"]


def as_pytorch_draws(*, heads_multiplied: bool = False, linear_std: float | None = None) -> Subject:
    """The reference, its head tied, with the weights that PyTorch's layers draw, or linear ones of its own."""

    def change(model):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                tied = module.weight is model.embedding.weight and module is not model.embedding
                if not tied:
                    module.reset_parameters()
                if isinstance(module, nn.Linear) and linear_std is not None and not tied:
                    nn.init.normal_(module.weight, std=linear_std)
        if heads_multiplied:
            model.head.register_forward_hook(lambda module, given, out: out * 1000.0)

    return Subject("as PyTorch draws", changed(change))


@pytest.mark.parametrize(
    ("how", "outcome"),
    [({}, "passed"), ({"linear_std": 0.02}, "failed"), ({"heads_multiplied": True}, "failed")],
    ids=["left to PyTorch", "own weights beside an embedding forgotten", "another cause"],
)
def test_a_wide_embedding_is_a_remark_where_all_is_left_to_pytorch(how, outcome):
    found = judge(check_loss_starts_near_uniform, as_pytorch_draws(**how), {})
    assert found.outcome == outcome
    if outcome == "passed":
        (remark,) = found.remarks
        assert "nn.Embedding with a standard deviation of 1" in remark and "ln 17 = 2.83" in remark
