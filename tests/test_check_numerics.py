"""What the checks of precision say: how many times what rounding costs, and the first module that costs it."""

from __future__ import annotations

import pytest

from checks import checks_in
from checks.bugs import all_bugs
from checks.subject import reference
from checks.verdict import Verdict, judge

CHECKS = {check.__name__.removeprefix("check_"): check for check in checks_in("numerics")}
BUGS = all_bugs()

# bug → the check that finds it, the module it names, what it says, the first likely bug
FOUND = {
    "downcast-inside": ("float32_keeps_its_digits", "activation", ("in float32", "1.73e+04 times"), "downcast-inside"),
    "mask-added-and-subtracted": (
        "float32_keeps_its_digits",
        "blocks.0.attention",
        ("in float32",),
        "mask-added-and-subtracted",
    ),
    "rms-in-half-precision": (
        "bfloat16_stays_close",
        "blocks.0.attention_norm",
        ("width 512", "allowed 4 times"),
        "rms-in-half-precision",
    ),
    "fp16-mask-overflow": (
        "float16_stays_close",
        "blocks.0.attention",
        ("NaN or infinity", "token 0 of 39"),
        "fp16-mask-overflow",
    ),
    "rope-angles-by-matmul": (
        "long_sequences_stay_close",
        "blocks.0.attention",
        ("512 tokens under autocast",),
        "rope-angles-by-matmul",
    ),
    "softmax-without-maximum": (
        "extreme_weights_give_finite_logits",
        "blocks.0.attention",
        ("20 times too large", "row 0, position 0"),
        "softmax-without-maximum",
    ),
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
