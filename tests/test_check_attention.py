"""The root of another width in the scale of attention is found in every spelling; designs with other scales pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.messages import expect_told
from transformer_checks.checks.check_attention import check_scores_are_scaled_by_their_own_width
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

ROPE, RANK = 2, 12


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def mixed(scores: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def flat(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    T = q.shape[2]
    scores = torch.baddbmm(torch.zeros(T, T).to(q), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=scale)
    return mixed(scores.view(*q.shape[:2], T, T), v)


SPELLINGS = {
    "fused": fused,
    "@": lambda q, k, v, scale: mixed(q @ k.mT * scale, v),
    "einsum": lambda q, k, v, scale: mixed(torch.einsum("bhtd,bhsd->bhts", q, k) * scale, v),
    "baddbmm": flat,
}


class Latent(nn.Module):
    """Keys come from a latent of width RANK; a rotary part of width ROPE, which heads share, is appended."""

    def __init__(self, sizes, scale, attend, absorbed=False):
        super().__init__()
        C, self.H = sizes["n_embd"], sizes["n_head"]
        self.D = C // self.H
        self.scale, self.attend, self.absorbed = scale(C, self.D + ROPE), attend, absorbed
        self.query, self.down = nn.Linear(C, C + self.H * ROPE), nn.Linear(C, RANK + ROPE)
        self.up, self.values = nn.Linear(RANK, C, bias=False), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, rope = self.query(x).view(B, T, self.H, -1).transpose(1, 2).split((self.D, ROPE), -1)
        latent, shared = self.down(x).split((RANK, ROPE), -1)
        k = self.up(latent).view(B, T, self.H, self.D).transpose(1, 2)
        if self.absorbed:  # the same scores, from queries that are mapped to the latent
            q = torch.einsum("bhtd,hdr->bhtr", q, self.up.weight.view(self.H, self.D, RANK))
            k = latent[:, None].expand(-1, self.H, -1, -1)
        q, k = torch.cat((q, rope), -1), torch.cat((k, shared[:, None].expand(-1, self.H, -1, -1)), -1)
        v = self.values(x).view(B, T, self.H, -1).transpose(1, 2)
        return self.attend(q, k, v, self.scale).transpose(1, 2).reshape(B, T, C)


def verdict(scale, attend=SPELLINGS["@"], **more) -> Verdict:
    class Model(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.embedding = nn.Embedding(sizes["vocab_size"], sizes["n_embd"])
            self.layers = nn.ModuleList(Latent(sizes, scale, attend, **more) for _ in range(2))
            self.head = nn.Linear(sizes["n_embd"], sizes["vocab_size"])

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x)

    subject = Subject("toy", SimpleNamespace(build_model=lambda **sizes: Model(sizes)), seed=3)
    return judge(check_scores_are_scaled_by_their_own_width, subject, {})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_root_of_a_latents_width_is_found_in_every_spelling(spelling):
    found = verdict(lambda C, D: (RANK + ROPE) ** -0.5, SPELLINGS[spelling])
    assert found.outcome == "failed" and found.where.module == "layers.0"
    assert "14 is the output width of down" in found.says and "have width 10" in found.says
    assert verdict(lambda C, D: D**-0.5, SPELLINGS[spelling]).outcome == "passed"


@pytest.mark.parametrize("width", ["the model's", "the latent's"])
def test_the_root_of_another_width_is_found(width):
    found = verdict(lambda C, D: (C if width == "the model's" else RANK) ** -0.5)
    assert found.outcome == "failed" and found.evidence["width"] == (32 if width == "the model's" else RANK)


@pytest.mark.parametrize(
    "scale",
    [lambda C, D: 1.0, lambda C, D: 1 / D, lambda C, D: D**-0.5 * 1.2, lambda C, D: 0.1],
)
def test_other_scales_are_designs(scale):
    assert verdict(scale).outcome == "passed"


def test_absorbed_queries_are_scaled_by_the_width_of_the_keys_they_stand_for():
    assert verdict(lambda C, D: D**-0.5, absorbed=True).outcome == "passed"


def test_a_coincidence_in_one_size_is_not_accused():
    assert verdict(lambda C, D: 32**-0.5).outcome == "passed"


def test_the_known_bug_is_told():
    expect_told(
        "attention", "scale-by-d-model",
        ("scores_are_scaled_by_their_own_width", "blocks.0.attention", ("1/√32", "width 8"), "scale-by-d-model"),
    )  # fmt: skip


PARTS = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Config:
    vocab_size: int = 50
    block_size: int = 32
    width: int = 32
    n_head: int = 4
    plain_width: int = 12
    rotary_width: int = 4
    scaled_by: int = 12


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.key = config.n_head, config.plain_width + config.rotary_width
        self.q, self.k = nn.Linear(config.width, self.H * self.key), nn.Linear(config.width, self.H * self.key)
        self.v, self.out = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.scale = SCALE

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part(x).view(B, T, self.H, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.mT * self.scale
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words, self.places = nn.Embedding(config.vocab_size, config.width), nn.Embedding(32, config.width)
        self.attention, self.head = Attention(config), nn.Linear(config.width, config.vocab_size)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(x + self.attention(x))
"""


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ("config.plain_width**-0.5", "1/√12, where 12 is the plain_width, but the queries and keys"),
        ("(config.plain_width + config.rotary_width) ** -0.5", ""),
        ("config.scaled_by**-0.5", ""),
        ("12**-0.5", ""),
    ],
    ids=["of a part", "of the whole", "an option that says so", "a number"],
)
def test_the_root_of_a_part_of_the_keys_width_is_found(tmp_path, scale, says):
    (tmp_path / "model.py").write_text(PARTS.replace("SCALE", scale))
    found = judge(check_scores_are_scaled_by_their_own_width, subject_of(str(tmp_path / "model.py"), seed=3), {})
    assert found.outcome == ("failed" if says else "passed"), found.says
    assert says in found.says
