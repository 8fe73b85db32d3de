"""Models too large to try everything in: leaks in one place are found, and work does not grow with the vocabulary.

The models are small and declared to have as many parameters as GPT-2, which is all that the sampling goes by.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.check_causality import (
    check_future_cannot_change_past,
    check_future_cannot_change_past_in_long_sequences,
    check_past_reaches_every_later_position,
)
from transformer_checks.checks.check_contract import (
    check_every_head_matters,
    check_too_long_a_sequence_is_no_silent_error,
)
from transformer_checks.checks.check_masking import check_rows_do_not_touch
from transformer_checks.checks.check_memorization import check_memorizes_a_random_string
from transformer_checks.checks.check_positions import check_order_of_tokens_matters
from transformer_checks.checks.expect import NotApplicable
from transformer_checks.checks.meet import load
from transformer_checks.checks.meet.sizes import Restored
from transformer_checks.checks.probes.influence import changes, every_id, some_of
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

PARAMETERS = 124_439_808
BLOCK = 300  # far beyond the tokens that most checks read of a large model


class Attention(nn.Module):
    """`opened` are pairs (t, s) of which t sees the later s; `open_from`: from there on everything sees everything."""

    def __init__(self, opened: tuple[tuple[int, int], ...], open_from: int | None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.opened, self.open_from = opened, open_from

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, 4, 8).transpose(1, 2) for part in self.qkv(x).split(C, -1))
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        for t, s in self.opened:
            if s < T:
                mask[t, s] = True
        if self.open_from is not None:
            mask[self.open_from :, self.open_from :] = True
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, opened=(), open_from=None) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), Attention(opened, open_from)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """`id` is seen one position early, `row` reads the row before it; it `slides` its positions for longer texts."""

    def __init__(self, V=400, *, opened=(), open_from=None, id=None, row=None, slides=False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, 32), nn.Embedding(BLOCK, 32)
        self.blocks = nn.ModuleList([Block(), Block(opened, open_from)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, V, bias=False)
        self.id, self.row, self.slides = id, row, slides

    def forward(self, idx):
        x = self.tokens(idx)
        if self.id is not None:
            early = (idx[:, 1:] == self.id)[..., None] * x[:, 1:]
            x = torch.cat((x[:, :-1] + early, x[:, -1:]), dim=1)
        positions = torch.arange(idx.shape[1])
        if self.slides:
            positions = (positions - max(len(positions) - BLOCK, 0)).clamp(min=0)
        x = x + self.positions(positions)
        if self.row is not None and len(x) > self.row:
            x = torch.cat((x[: self.row], x[self.row : self.row + 1] + x[self.row - 1], x[self.row + 1 :]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def expect_found(check, subject: Subject, says: str):
    """Not `pytest.raises`: a check that is not applicable would count as a skipped test."""
    verdict = judge(check, subject, {})
    assert verdict.outcome == "failed" and says in verdict.says, (verdict.outcome, verdict.says)
    return verdict


@pytest.fixture
def large(monkeypatch):
    """Makes a subject of a model, which is taken to have as many parameters as GPT-2."""
    monkeypatch.setattr(load, "MOST_TOKENS", load.FEWER_TOKENS)

    def make(**how) -> Subject:
        torch.manual_seed(0)
        subject = subject_of(Model(**how), seed=0)
        vars(subject)["parameters"] = PARAMETERS
        return subject

    return make


def test_a_right_model_passes_and_the_evidence_says_what_was_sampled(large):
    subject = large()
    for check in (check_future_cannot_change_past, check_order_of_tokens_matters):
        verdict = judge(check, subject, {})
        assert verdict.outcome == "passed", verdict.says
        assert "not looked at" in verdict.evidence["sample"]
    assert judge(check_every_head_matters, subject, {}).outcome == "passed"
    far = judge(check_future_cannot_change_past_in_long_sequences, subject, {})
    assert (far.outcome, far.evidence["farthest"]) == ("passed", BLOCK)
    assert judge(check_rows_do_not_touch, subject, {}).outcome == "passed"
    assert judge(check_past_reaches_every_later_position, subject, {}).outcome == "passed"


@pytest.mark.parametrize("id", (0, 1, 157, 399))
def test_an_id_that_is_seen_early_is_found_among_all(large, id):
    expect_found(check_future_cannot_change_past, large(id=id), "sees the future")


@pytest.mark.parametrize("pair", ((40, 41), (100, 290), (0, 299), (298, 299)))
def test_one_leaking_pair_beyond_what_most_checks_read_is_found(large, pair):
    subject = large(opened=(pair,))
    verdict = expect_found(check_future_cannot_change_past_in_long_sequences, subject, "sees the future")
    assert verdict.where.module == "blocks.1.attention"


@pytest.mark.parametrize("open_from", (30, 128, 257, 298))
def test_a_mask_that_ends_is_found(large, open_from):
    expect_found(check_future_cannot_change_past_in_long_sequences, large(open_from=open_from), "sees the future")


@pytest.mark.parametrize("row", (1, 2))
def test_a_row_that_reads_another_is_found(large, row):
    expect_found(check_rows_do_not_touch, large(row=row), "other rows")


def test_a_model_that_reads_wrong_beyond_its_own_limit_is_found(large):
    expect_found(check_too_long_a_sequence_is_no_silent_error, large(slides=True), "no error")


def test_training_is_refused_with_what_would_change_it(large):
    with pytest.raises(NotApplicable, match=r"124,439,808 parameters.*build_model"):
        check_memorizes_a_random_string(large())


def test_work_does_not_grow_with_the_vocabulary(large, monkeypatch):
    """The tokens that the whole model reads; those read without its blocks cost next to nothing."""
    read = []
    real = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x: read.append(x.shape[0] * x.shape[1]) or real(self, x))
    counted = []
    for V in (400, 4000):
        subject, before = large(V=V), sum(read)
        check_future_cannot_change_past(subject)
        counted.append(sum(read) - before)
    assert counted[1] <= counted[0], counted


class Tied(nn.Module):
    """A head that holds no matrix of its own."""

    def __init__(self, table: list[nn.Embedding]) -> None:
        super().__init__()
        self.table = table  # in a list, so that it is not registered

    def forward(self, x):
        return x @ self.table[0].weight.t()


def test_a_head_that_holds_no_matrix_is_no_error(large):
    subject = large(id=157)
    model = subject.build()
    model.head = Tied([model.tokens])
    other = subject_of(model, seed=0)
    vars(other)["parameters"] = PARAMETERS
    verdict = expect_found(check_future_cannot_change_past, other, "sees the future")
    assert verdict.evidence["length"] <= 16


def test_a_sample_has_the_ends_of_ids_and_places(large):
    subject = large()
    tokens = every_id(subject, 16)
    assert len(tokens) < 400 and bool((tokens == 0).any()) and bool((tokens == 399).any())
    tried = changes(subject, tokens)
    assert {1, 15} <= set(tried.place.tolist()) and len(tried.place) < tried.of
    later = torch.arange(16) >= tried.place[:, None]
    assert torch.equal(tried.plain != tried.changed, later)
    alone = changes(subject, tokens[:1], alone=True)
    assert sorted(set(alone.place.tolist())) == list(range(16))
    assert bool(((alone.plain != alone.changed).sum(dim=1) == 1).all())


def test_some_of_keeps_the_ends_and_the_order():
    assert some_of(list("abcdef"), 6, seed=0) == list("abcdef")
    few = some_of(list(range(100)), 5, seed=3)
    assert len(few) == 5 and few[0] == 0 and few[-1] == 99 and few == sorted(few)
    assert few != some_of(list(range(100)), 5, seed=4)


def test_a_small_model_is_tried_whole():
    subject = subject_of("transformer", seed=0)
    assert subject.affordable(16, 100) == 100
    tried = changes(subject, every_id(subject, 13))
    assert len(tried.place) == tried.of == 17 * 13 * 2


@pytest.mark.parametrize("parameters", [3_000_000, 30_000_000])
def test_that_every_late_token_is_read_is_asked_of_those_that_were_changed(parameters):
    """Of a model that is built, whose length can be varied."""
    subject = reference(seed=0)
    vars(subject)["parameters"] = parameters
    verdict = judge(check_past_reaches_every_later_position, subject, {})
    assert verdict.outcome == "passed", verdict.says
    late = all_bugs()["late-tokens-never-seen"].subject(seed=0)
    vars(late)["parameters"] = parameters
    verdict = judge(check_past_reaches_every_later_position, late, {})
    assert verdict.outcome == "failed" and "late-tokens-never-seen" in verdict.likely


def test_large_tensors_are_put_back_after_any_change():
    model = nn.Linear(600, 600)
    again = Restored(model)
    want = model.weight.detach().clone()
    kept = again().weight.data_ptr()
    assert again().weight.data_ptr() == kept  # nothing was changed, so nothing is copied
    for change in (
        lambda: model.weight.data.add_(1),
        lambda: model.double(),
        lambda: setattr(model.weight, "data", model.weight.data.t()),
        lambda: setattr(model, "weight", nn.Parameter(torch.zeros(2))),
    ):
        change()
        again()
        assert model.weight.dtype == want.dtype and torch.equal(model.weight, want)
