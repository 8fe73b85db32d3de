"""What the checks of initialization say: the loss, the layers, the seed, the depth."""

from __future__ import annotations

import pytest
import torch

from checks import checks_in
from checks.bugs import all_bugs
from checks.bugs.variants import changed
from checks.subject import Subject, reference
from checks.verdict import Verdict, judge

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks_in("initialization")}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
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


def verdict(check: str, bug: str) -> Verdict:
    return judge(CHECKS[check], BUGS[bug].subject(seed=3), {})


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    check, module, facts, likely = FOUND[bug]
    found = verdict(check, bug)
    assert found.outcome == "failed", found.says
    assert (found.where.module if found.where else None) == module
    for fact in facts:
        assert fact in found.says
    assert likely in found.likely[:2]
    assert found.advice


@pytest.mark.parametrize("check", CHECKS)
def test_the_reference_is_not_accused(check):
    found = judge(CHECKS[check], reference(seed=5), {})
    assert found.outcome in ("passed", "not_applicable"), found.says


def test_one_layer_drawn_larger_is_not_depth():
    def change(model):
        with torch.no_grad():
            model.blocks[-1].feed_forward.output.weight.mul_(30)

    found = judge(CHECKS["depth_does_not_blow_up"], Subject("larger", changed(change)), {})
    assert found.outcome == "passed", found.says
