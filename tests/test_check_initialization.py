"""What the checks of initialization say: the loss, the layers, the seed, the depth."""

from __future__ import annotations

import pytest
import torch

from checks.bugs.variants import changed
from checks.check_initialization import check_depth_does_not_blow_up
from checks.subject import Subject
from checks.verdict import judge
from tests.messages import Told, expect_told

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
        "every_layer_seeded",
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
    "residual-doubled": ("depth_does_not_blow_up", "blocks.15", ("from layer 8 to layer 16",), "residual-doubled"),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    expect_told("initialization", bug, FOUND[bug])


def test_one_layer_drawn_larger_is_not_depth():
    def change(model):
        with torch.no_grad():
            model.blocks[-1].feed_forward.output.weight.mul_(30)

    found = judge(check_depth_does_not_blow_up, Subject("larger", changed(change)), {})
    assert found.outcome == "passed", found.says
