"""Findings of the laws on every code path: the path, the row, the module; and the paths that a model has not."""

from __future__ import annotations

import pytest
import torch

from tests.messages import Told, expect_told
from transformer_checks.checks import check_paths
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.check_causality import check_prefix_gives_the_same_logits
from transformer_checks.checks.check_contract import check_too_long_a_sequence_is_no_silent_error
from transformer_checks.checks.check_paths import (
    check_future_cannot_change_past_on_any_path,
    check_prefixes_agree_on_any_path,
    check_rows_do_not_touch_on_any_path,
)
from transformer_checks.checks.probes import paths
from transformer_checks.checks.probes.paths import every_path
from transformer_checks.checks.reference import reference, reference_parts
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND: dict[str, Told] = {
    "rows-mix-in-long-sequences": (
        "rows_do_not_touch_on_any_path",
        "Rolled",
        ("the logits of row 0", "in a long sequence, 3 rows of 131 tokens"),
        "rows-mix-in-long-sequences",
    ),
    "rows-mix-under-autocast": (
        "rows_do_not_touch_on_any_path",
        "Rolled",
        ("under autocast to bfloat16", "exactly 0"),
        "rows-mix-under-autocast",
    ),
    "rows-mix-in-large-batches": (
        "rows_do_not_touch_on_any_path",
        "Chunked",
        ("in a large batch, 33 rows",),
        "rows-mix-in-large-batches",
    ),
    "pad-mask-lost-under-autocast": (
        "padding_is_unread_on_any_path",
        "blocks.0.attention",
        ("padding on the left", "in row 1 at position", "under autocast"),
        "pad-mask-lost-under-autocast",
    ),
    "causal-mask-lost-with-gradients": (
        "future_cannot_change_past_on_any_path",
        "blocks.0.attention",
        ("position 0 sees the future", "with gradients recorded"),
        "no-causal-mask",
    ),
    "causal-mask-lost-in-recomputation": (
        "future_cannot_change_past_on_any_path",
        "blocks.0.attention",
        ("position 0 sees the future", "activation checkpointing"),
        "no-causal-mask",
    ),
    "positions-stretched-when-long": (
        "prefixes_agree_on_any_path",
        None,
        ("the first 2 of 521 tokens", "in a long sequence"),
        "positions-stretched-when-long",
    ),
    "noise-under-autocast": (
        "calls_repeat_on_any_path",
        "Noisy",
        ("the same call gives different logits (under autocast",),
        "noise-under-autocast",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_path_and_the_place(bug):
    expect_told("paths", bug, FOUND[bug])


@pytest.mark.parametrize("bug", FOUND)
def test_the_same_is_found_where_all_laws_are_tried_on_one_path_before_the_next(bug, monkeypatch):
    for module in (paths, check_paths):
        monkeypatch.setattr(module, "costly", lambda subject: True)
    subject = all_bugs()[bug].subject(seed=3)
    check, *_ = FOUND[bug]
    for law in ("rows_do_not_touch_on_any_path", check):
        found = judge(getattr(check_paths, f"check_{law}"), subject, {})
    assert found.outcome == "failed"
    assert bug in found.likely or check == "future_cannot_change_past_on_any_path"
    assert all(part in found.says for part in FOUND[bug][2])


def test_the_paths_that_were_tried_and_those_it_has_not_are_evidence():
    found = judge(check_rows_do_not_touch_on_any_path, reference(), {})
    assert found.outcome == "passed"
    assert any("in a long sequence, 2 rows of 521" in path for path in found.evidence["paths"])
    assert "no switch" in found.evidence["paths_it_has_not"]["in train mode with activation checkpointing"]


def test_a_path_that_the_model_refuses_is_evidence_and_no_crash():
    subject = reference()
    build = subject.parts.build_model

    def refusing(**sizes):
        model = build(**sizes)
        forward = model.forward

        def read(tokens, **given):
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError("no autocast here")
            return forward(tokens, **given)

        model.forward = read
        return model

    subject.parts.build_model = refusing
    found = judge(check_rows_do_not_touch_on_any_path, subject, {})
    assert found.outcome == "passed"
    assert "no autocast here" in found.evidence["paths_it_has_not"]["under autocast to bfloat16"]


def test_a_model_that_sees_the_future_by_design_is_judged_by_rows_and_not_by_prefixes():
    subject = reference(causal=False)
    assert judge(check_rows_do_not_touch_on_any_path, subject, {}).outcome == "passed"
    for check in (check_future_cannot_change_past_on_any_path, check_prefixes_agree_on_any_path):
        assert judge(check, subject, {}).outcome == "not_applicable"


def test_models_on_their_paths_are_built_once():
    subject = reference()
    one, two = list(every_path(subject, {})), list(every_path(subject, {}))
    assert len(one) > 8 and all(a is b for a, b in zip(one, two, strict=True))


def rescaled(declares: dict[str, int]):
    """Rotary positions that are squeezed in texts of more than 8 tokens, as dynamic NTK scaling does."""
    subject = Subject("rescaled", reference_parts(positions="rotary"))
    build = subject.parts.build_model

    def build_rescaled(**sizes):
        model = build(**sizes)
        rotation = model.positions.rotation
        model.positions.rotation = lambda positions, dtype: rotation(positions * min(1, 8 / positions.shape[-1]), dtype)
        vars(model).update(declares)
        return model

    subject.parts.build_model = build_rescaled
    return subject


def test_frequencies_rescaled_beyond_a_declared_length_are_judged_up_to_it():
    subject = rescaled({"original_max_len": 8})
    for check in (check_prefix_gives_the_same_logits, check_prefixes_agree_on_any_path):
        found = judge(check, subject, {})
        assert found.outcome == "passed", found.says
        assert "beyond 8 tokens (original_max_len)" in found.remarks[0]
    assert judge(check_too_long_a_sequence_is_no_silent_error, subject, {}).outcome != "failed"


@pytest.mark.parametrize("declares", [{}, {"original_max_len": 6}, {"n_layer": 8}], ids=str)
def test_frequencies_rescaled_beyond_a_length_that_nothing_declares_are_a_finding(declares):
    found = judge(check_prefix_gives_the_same_logits, rescaled(declares), {})
    assert found.outcome == "failed" and "of 13 tokens have different logits when read alone" in found.says
