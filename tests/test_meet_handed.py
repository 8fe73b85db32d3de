"""A causal mask is handed to a model only where the model requires it or the user's own code gives it."""

from __future__ import annotations

import pytest

from transformer_checks.checks import check_model
from transformer_checks.checks.run.subjects import subject_of

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, mask):
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, vocab_size=31, block_size=16, n_embd=32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd) for _ in range(2))
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx, mask{default}):
        x = self.tokens(idx) + self.places(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)
"""
TRAIN = """
import torch
from model import GPT

def train(batches):
    model = GPT()
    for x, y in batches:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        logits = model({call})
"""


def met(folder, default, call=None):
    (folder / "model.py").write_text(MODEL.format(default=default))
    if call is not None:
        (folder / "train.py").write_text(TRAIN.format(call=call))
    return str(folder / "model.py")


def test_a_required_mask_is_handed(tmp_path):
    subject = subject_of(met(tmp_path, ""))
    assert "a causal mask is passed as mask (True drops)" in subject.header and subject.mask_left_out == ""


@pytest.mark.parametrize("call", ["x, mask", "x, mask=mask"])
def test_one_that_the_training_script_gives_is_handed(tmp_path, call):
    subject = subject_of(met(tmp_path, "=None", call))
    assert "a causal mask is passed as mask (True drops), as in train.py:9" in subject.header


@pytest.mark.parametrize("call", [None, "x", "x, None", "x, mask=None"])
def test_one_that_nobody_gives_is_not(tmp_path, call):
    subject = subject_of(met(tmp_path, "=None", call))
    assert "causal mask" not in subject.header and subject.mask_left_out == "mask"


def test_the_finding_says_that_the_mask_was_left_out(tmp_path):
    report = check_model(met(tmp_path, "=None"), checks="check_future_cannot_change_past", seed=0)
    (verdict,) = report.broken
    assert verdict.likely[0] == "no-causal-mask"
    assert "It does not when mask is given a causal mask" in verdict.says
    assert "Make the causal mask in forward where mask is None" in verdict.advice
