"""Findings of the precision checks: the error in multiples of what rounding costs, and the module that causes it."""

from __future__ import annotations

import pytest

from tests.messages import Told, expect_told

FOUND: dict[str, Told] = {
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


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("numerics", bug, FOUND[bug])
