"""What the checks of other paths say: which path, which position, which module."""

from __future__ import annotations

import pytest

from tests.messages import Told, expect_told

FOUND: dict[str, Told] = {
    "device-hardcoded": ("forward_stays_on_its_device", "add", ("torch.arange", "embedding"), "device-hardcoded"),
    "backends-disagree": (
        "attention_backends_agree",
        "blocks.0.attention",
        ("the attribute flash inverted (without a mask)",),
        "backends-disagree",
    ),
    "other-path-when-compiled": (
        "compiled_model_agrees",
        None,
        ("torch.compile", "position 1"),
        "other-path-when-compiled",
    ),
    "constant-baked-in": ("exported_model_agrees", None, ("torch.export", "position 0"), "constant-baked-in"),
    "recomputation-under-no-grad": (
        "recomputation_changes_nothing",
        None,
        ("embedding.weight gets a different gradient",),
        "recomputation-under-no-grad",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    expect_told("portability", bug, FOUND[bug])
