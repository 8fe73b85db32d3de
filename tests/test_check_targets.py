"""Which token each prediction is trained on: further heads, encoder-decoders, and files as users have them."""

from __future__ import annotations

import pytest

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.check_causality import check_future_cannot_change_past, check_targets_change_no_logits
from transformer_checks.checks.check_gradients import check_every_parameter_gets_a_gradient
from transformer_checks.checks.check_targets import check_every_head_predicts_the_token_after_what_it_read
from transformer_checks.checks.loss.heads import heads_of
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width, cross=False):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.memory = nn.MultiheadAttention(width, 4, batch_first=True) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, causal=True, memory=None):
        T, y = x.shape[1], self.norm(x)
        future = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
        x = x + self.attention(y, y, y, attn_mask=future, need_weights=False)[0]
        if memory is not None:
            x = x + self.memory(x, memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Base(nn.Module):
    def __init__(self, vocab_size, block_size, n_embd):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.layer, self.head = Layer(n_embd), nn.Linear(n_embd, vocab_size)
        self.ahead = nn.ModuleList([nn.Linear(n_embd, vocab_size) for _ in range(2)])
        self.reader = Layer(n_embd, cross=True)

    def embed(self, ids):
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
"""
PARALLEL = """
class GPT(Base):
    def forward(self, idx, targets=None):
        x = self.layer(self.embed(idx))
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for k, head in enumerate(self.ahead, 1):
            n = k + LATER
            loss = loss + F.cross_entropy(head(x[:, :-n]).flatten(0, 1), targets[:, n:].flatten()) / 2
        return logits, loss
"""
CHAINED = """
class GPT(Base):
    def forward(self, idx, targets=None):
        x = self.layer(self.embed(idx))
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = F.nll_loss(logits.log_softmax(-1).flatten(0, 1), targets.flatten())
        n = 1 + LATER
        y = self.reader(x[:, :-1] + self.wte(targets[:, :-1]), memory=x[:, :1])
        further = self.ahead[0](y)[:, : targets.shape[1] - n]
        return logits, loss + F.cross_entropy(further.transpose(1, 2), targets[:, n:])
"""
ENCODED = """
class Seq2Seq(Base):
    def forward(self, input_ids, decoder_input_ids=None, labels=None):
        if decoder_input_ids is None or labels is not None:
            decoder_input_ids = F.pad(labels[:, :-1], (1, 0))
        memory = self.layer(self.embed(input_ids), causal=False)
        logits = self.head(self.reader(self.embed(decoder_input_ids), memory=memory))
        if labels is None:
            return {"logits": logits}
        n = logits.shape[1] - LATER
        return {"loss": F.cross_entropy(logits[:, :n].flatten(0, 1), labels[:, LATER:].flatten()), "logits": logits}
"""


def met(tmp_path, source, later):
    (tmp_path / "model.py").write_text(HEAD + source.replace("LATER", str(later)))
    return subject_of(str(tmp_path / "model.py"))


@pytest.mark.parametrize(
    ("source", "right", "facts"),
    [
        (PARALLEL, [(0, 1), (0, 2), (0, 3)], "prediction 2 of 3", ),
        (CHAINED, [(0, 1), (1, 1)], "has read the text up to token t + 1 and is trained on token t + 3"),
        (ENCODED, [(-1, 1)], "up to token t - 1 and is trained on token t + 1, expected t"),
    ],
    ids=["parallel", "chained", "encoder-decoder"],
)  # fmt: skip
def test_labels_shifted_again_are_found(source, right, facts, tmp_path):
    subject = met(tmp_path, source, 0)
    assert [(head.read, head.ahead) for head in heads_of(subject)] == right
    assert judge(check_every_head_predicts_the_token_after_what_it_read, subject, {}).outcome == "passed"
    verdict = judge(check_every_head_predicts_the_token_after_what_it_read, met(tmp_path, source, 1), {})
    assert verdict.outcome == "failed" and facts in verdict.says, verdict.says
    lines = (tmp_path / "model.py").read_text().splitlines()
    assert "cross_entropy" in lines[verdict.where.line - 1]


def test_an_encoder_decoder_that_shifts_its_labels_itself_is_met_and_not_accused(tmp_path):
    subject = met(tmp_path, ENCODED, 0)
    assert "forward(input_ids, decoder_input_ids)" in subject.header
    for check in (check_future_cannot_change_past, check_targets_change_no_logits):
        assert judge(check, subject, {}).outcome == "passed"


def test_labels_that_are_not_shifted_to_the_decoder_are_seen(tmp_path):
    subject = met(tmp_path, ENCODED.replace("F.pad(labels[:, :-1], (1, 0))", "labels"), 0)
    assert judge(check_targets_change_no_logits, subject, {}).outcome == "failed"


@pytest.mark.parametrize(("source", "trained", "dead"), [(PARALLEL, "ahead", "reader"), (CHAINED, "reader", "ahead.1")])
def test_what_only_the_loss_trains_is_no_dead_weight(source, trained, dead, tmp_path):
    """The base has parts to spare."""
    verdict = judge(check_every_parameter_gets_a_gradient, met(tmp_path, source, 0), {})
    assert verdict.outcome == "failed"
    assert dead in verdict.says and trained not in verdict.says


def test_a_finding_says_how_far_each_prediction_has_read():
    for bug, facts in (
        ("labels-shifted-again", "is trained on token t + 3, expected t + 2"),
        ("second-head-skips-a-token", "none is trained on token t + 2"),
        ("second-head-copies", "already read"),
    ):
        subject = all_bugs()[bug].subject(seed=0)
        verdict = judge(check_every_head_predicts_the_token_after_what_it_read, subject, {})
        assert verdict.outcome == "failed" and facts in verdict.says, verdict.says
        assert bug in verdict.likely
