"""Findings of the position checks: the positions that look the same, and what should tell them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs.designs import NoPositions, changed
from transformer_checks.checks.check_positions import (
    check_order_of_tokens_matters,
    check_rotary_angle_depends_on_distance,
    check_rotary_positions_stay_apart_in_bfloat16,
)
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND: dict[str, Told] = {
    "rope-angles-in-the-models-type": (
        "rotary_positions_stay_apart_in_bfloat16",
        None,
        ("positions 256 and 257 are rotated alike",),
        "rope-angles-in-the-models-type",
    ),
    "position-constant": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 1 of 40", "all 109 pairs", "positions.table.weight"),
        "position-constant",
    ),
    "positions-start-again": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 8 of 40", "8 of 109 pairs"),
        "positions-start-again",
    ),
    "rotary-positions-start-again": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 32 of 40",),
        "positions-start-again",
    ),
    "positions-start-again-at-128": (
        "order_of_tokens_matters",
        None,
        ("tokens 0 and 128 of 131",),
        "positions-start-again-at-128",
    ),
    "positions-clamped": ("order_of_tokens_matters", None, ("of 131", "look the same"), "positions-start-again"),
    "rope-on-the-wrong-axis": (
        "order_of_tokens_matters",
        None,
        ("order has no effect", "RotaryAlongHeads"),
        "rope-on-the-wrong-axis",
    ),
    "rope-opposite-signs": (
        "rotary_angle_depends_on_distance",
        "blocks.0",
        ("query 4 and key 4", "query 3 and key 3"),
        "rope-opposite-signs",
    ),
    "rope-only-on-q": ("rotary_angle_depends_on_distance", "blocks.0", ("not relative",), "rope-only-on-q"),
}


HEADS_IN_A_LIST = Path(__file__).parent / "homework" / "heads_in_a_list.py"


@pytest.mark.parametrize("positions", ["torch.arange(T)", "torch.arange(T) % 8"])
def test_the_heads_of_an_only_block_are_no_blocks(positions, tmp_path):
    """They stand in the model's outermost list, but read the same tensor: none of them is deleted."""
    path = tmp_path / "model.py"
    path.write_text(HEADS_IN_A_LIST.read_text().replace("torch.arange(T)", positions))
    found = judge(check_order_of_tokens_matters, subject_of(str(path)), {})
    assert found.outcome == ("passed" if positions == "torch.arange(T)" else "failed"), found.says
    assert "8" not in positions or "tokens 0 and 8 of" in found.says


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_place_and_the_cause(bug):
    expect_told("positions", bug, FOUND[bug])


def test_unused_position_ids_do_not_count_as_positions():
    """A model with rotary positions switched off may still hold position ids, which nothing turns into angles."""

    def change(model):
        model.positions = NoPositions()
        for name in ("position_ids", "token_positions"):
            setattr(model.blocks[0], name, torch.arange(13))

    found = judge(check_order_of_tokens_matters, Subject("ids", changed(change), seed=3), {})
    assert found.outcome == "passed" and "NoPE" in found.remarks[0]


TURNING = """
import torch
from torch import nn


def turn_pairs(x, table):
    sin, cos = table[: x.shape[-2]].sin(), table[: x.shape[-2]].cos()
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    def __init__(self, width, heads, length):
        super().__init__()
        self.heads, half = heads, torch.arange(0, width // heads, 2) / (width // heads)
        angles = torch.outer(torch.arange(length), 10000.0**-half)
        self.register_buffer("table", LAYOUT)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k = turn_pairs(q, self.table), turn_pairs(k, self.table)
        k, v = (nn.functional.pad(part, (0, 0, 0, EMPTY)) for part in (k, v))
        seen = torch.ones(T, T + EMPTY, dtype=torch.bool).tril()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return x + self.out(y.transpose(1, 2).reshape(B, T, C))


class Model(nn.Module):
    def __init__(self, vocab_size, width=32, heads=2, layers=2, length=64):
        super().__init__()
        self.words, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.layers = nn.ModuleList(Attention(width, heads, length) for _ in range(layers))

    def forward(self, tokens):
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
"""


@pytest.mark.parametrize("empty", [0, 3])  # places of a cache behind the keys
@pytest.mark.parametrize(
    ("name", "layout", "outcome"),
    [
        ("apply_rope", "torch.cat((angles, angles), -1)", "failed"),
        ("apply_rope", "angles.repeat_interleave(2, -1)", "passed"),
        ("rotate", "torch.cat((angles, angles), -1)", "failed"),
        ("turn_pairs", "angles.repeat_interleave(2, -1)", "not_applicable"),
    ],
)
def test_a_rotation_is_met_by_any_name_in_the_file(tmp_path, name, layout, outcome, empty):
    code = TURNING.replace("LAYOUT", layout).replace("turn_pairs", name).replace("EMPTY", str(empty))
    (tmp_path / "model.py").write_text(code)
    found = judge(check_rotary_angle_depends_on_distance, subject_of(str(tmp_path / "model.py"), seed=3), {})
    assert found.outcome == outcome, found.says
    assert outcome != "failed" or "is not relative" in found.says


def test_a_model_that_refuses_weights_in_bfloat16_is_not_judged_in_it():
    def change(model):
        model.head.register_forward_pre_hook(lambda module, given: given[0].float())

    subject = Subject("float32", changed(change, positions="rotary"))
    found = judge(check_rotary_positions_stay_apart_in_bfloat16, subject, {})
    assert found.outcome == "not_applicable" and "does not run with weights in bfloat16" in found.says
