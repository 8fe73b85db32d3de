"""Findings of the masking checks: the row and position that change, the module, the likely cause."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.messages import Told, expect_told, verdict
from transformer_checks.checks.check_masking import (
    check_left_padding_changes_nothing,
    check_mask_types_agree,
    check_packed_documents_stay_apart,
    check_pad_contents_change_nothing,
)
from transformer_checks.checks.probes.extra_arguments import DOCUMENTS, taken
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND: dict[str, Told] = {
    "pad-mask-ignored": (
        "pad_contents_change_nothing",
        "blocks.0.attention",
        ("padding on the left", "in row 1 at position 6", "in eval mode"),
        "pad-mask-ignored",
    ),
    "pad-mask-on-queries": (
        "pad_contents_change_nothing",
        "blocks.0.attention",
        ("padding on the left", "in row 1 at position 6"),
        "pad-mask-on-queries",
    ),
    "mask-repeated-in-wrong-head-batch-order": (
        "pad_contents_change_nothing",
        "blocks.0.attention",
        ("in row 1",),
        "mask-repeated-in-wrong-head-batch-order",
    ),
    "bool-mask-semantics-inverted": (
        "mask_of_ones_changes_nothing",
        None,
        ("marks all 2 tokens as real", "position 1"),
        "bool-mask-semantics-inverted",
    ),
    "fully-masked-row-nan": (
        "rows_of_padding_do_no_harm",
        "blocks.0.attention",
        ("a padded token are not finite", "in row 1 at position 0"),
        "fully-masked-row-nan",
    ),
    "float-mask-added": ("mask_types_agree", None, ("as float32", "padding: left"), "float-mask-added"),
    "packing-cross-contamination": (
        "packed_documents_stay_apart",
        None,
        ("document 1 (tokens 6 to 12 of 13",),
        "packing-cross-contamination",
    ),
    "left-pad-positions-not-from-mask": (
        "left_padding_changes_nothing",
        None,
        ("padded on the left", "than alone"),
        "left-pad-positions-not-from-mask",
    ),
    "position-reversed": (
        "right_padding_changes_nothing",
        None,
        ("padded on the right", "than alone"),
        "pad-mask-on-queries",
    ),
    "batch-statistics": (
        "rows_do_not_touch",
        "Centred",
        ("changes the logits of row 0 of 2", "in eval mode"),
        "batch-statistics",
    ),
    "head-batch-axes-confused": (
        "rows_do_not_touch",
        "blocks.0.attention",
        ("row 0 of 2",),
        "head-batch-axes-confused",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("masking", bug, FOUND[bug])


def test_the_smallest_padded_batch_is_shown():
    found = verdict("masking", "left_padding_changes_nothing", "left-pad-positions-not-from-mask")
    assert found.example["case"]["real"] == [1] and found.example["case"]["length"] == 2


def test_a_model_without_a_mask_is_not_judged():
    subject = reference()
    subject.__class__ = type("Maskless", (Subject,), {"mask_forms": ()})
    for check in (check_pad_contents_change_nothing, check_left_padding_changes_nothing, check_mask_types_agree):
        assert judge(check, subject, {}).outcome == "not_applicable"


def test_tokens_called_a_sequence_are_no_document_ids():
    class Named(torch.nn.Module):
        def forward(self, sequence, targets=None, segment_ids=None):
            return sequence

    subject = SimpleNamespace(build=lambda seed: Named(), seed=0)
    assert taken(subject, DOCUMENTS).name == "segment_ids"
    assert taken(SimpleNamespace(build=lambda seed: torch.nn.Identity(), seed=0), DOCUMENTS) is None


ROTARY = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab_size, n_embd), nn.Linear(n_embd, vocab_size)
        self.query, self.key = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)
        angles = torch.outer(torch.arange(block_size), 100.0 ** (-torch.arange(n_embd // 2) / n_embd))
        self.register_buffer("sines", torch.stack((angles.sin(), angles.cos())){exact})

    def turned(self, x):
        sin, cos = self.sines[:, : x.shape[1]]{inexact}
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, idx, attention_mask=None):
        x, T = self.tokens(idx), idx.shape[1]
        scores = self.turned(self.query(x)) @ self.turned(self.key(x)).transpose(1, 2)
        hidden = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
        if attention_mask is not None:
            hidden = hidden | ~attention_mask.bool()[:, None] & ~torch.eye(T, dtype=torch.bool, device=idx.device)
        return self.head(x + scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ x{added})
"""


@pytest.mark.parametrize(
    ("exact", "inexact", "added", "outcome"),
    [
        ("", "", "", "passed"),
        ("", ".float()", "", "passed"),
        (".to(torch.bfloat16).float()", "", "", "failed"),  # coarser than any type that the model computes with
        ("", "", " + self.sines[0, :T].repeat(1, 2)", "failed"),  # positions that padding moves
    ],
)
def test_a_table_of_sines_is_as_exact_as_the_type_that_it_was_made_in(tmp_path, exact, inexact, added, outcome):
    (tmp_path / "model.py").write_text(ROTARY.format(exact=exact, inexact=inexact, added=added))
    found = judge(check_left_padding_changes_nothing, subject_of(str(tmp_path / "model.py"), seed=3), {})
    assert found.outcome == outcome, found.says


PACKED = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, width=32, length=64):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, vocab_size)

    def forward(self, tokens, segment_ids=None, positions=None):
        T = tokens.shape[1]
        if segment_ids is None:
            segment_ids = torch.ones_like(tokens)
        if positions is None:
            positions = torch.arange(T).expand_as(tokens)
        x = self.words(tokens) + self.places(positions)
        q, k, v = self.qkv(x).chunk(3, -1)
        past = torch.ones(T, T, dtype=torch.bool).tril()
        seen = past & (segment_ids[:, :, None] == segment_ids[:, None]) if SEEN else past
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        return self.head(x + weights @ v)
"""


@pytest.mark.parametrize(("seen", "outcome"), [("True", "passed"), ("False", "failed")])
def test_positions_that_the_caller_counts_are_counted_from_each_documents_start(tmp_path, seen, outcome):
    (tmp_path / "model.py").write_text(PACKED.replace("SEEN", seen))
    found = judge(check_packed_documents_stay_apart, subject_of(str(tmp_path / "model.py"), seed=0), {})
    assert found.outcome == outcome, found.says
