"""`make bench` at a tiny size: what it prints, and what it leaves out with a word."""

from __future__ import annotations

import sys

import pytest

from benchmarks import compare, peers
from transformer_checks.checks.probes import timing
from transformer_checks.checks.subject import Sizes

# what the libraries use of torch is their business
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 65
    block_size: int = 64
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding, self.head = nn.Embedding(config.vocab_size, 8), nn.Linear(8, config.vocab_size)
        print("number of parameters")

    def forward(self, tokens, targets):
        logits = self.head(self.embedding(tokens))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.AdamW(self.parameters(), rate)

    def generate(self, tokens, n, top_k):
        for _ in range(n):
            tokens = torch.cat((tokens, self.head(self.embedding(tokens[:, -1:])).argmax(-1)), 1)
        return tokens
"""


@pytest.fixture
def bench(monkeypatch, capsys):
    monkeypatch.setattr(compare, "SIZES", Sizes(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=16))
    monkeypatch.setattr(compare, "T", 8)
    monkeypatch.setattr(compare, "NEW_TOKENS", 7)

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", "--rounds", "3", "--threads", "1", *options])
        compare.main()
        return capsys.readouterr().out

    return run


def test_every_figure_of_the_readme_is_printed_with_its_budget(bench, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    said = bench("--nanogpt", str(tmp_path))
    for name in (
        "ours, bfloat16",
        "ours, bfloat16, fused",
        "nanoGPT, bfloat16",
        "HF GPT-2",
        "x-transformers",
        "matrix-vector products",
    ):
        assert name in said
    short = said.partition("summary: ")[2]
    for figure in (
        "step, float32 / matrix products", "step, float32 / nanoGPT", "step, bfloat16 / nanoGPT in float32",
        "step, bfloat16 / nanoGPT in bfloat16",
        "share of the matrix-vector bound", "as fast as HF with its cache", "as fast as nanoGPT",
    ):  # fmt: skip
        assert figure in short
    assert short.count("budget") == 10 and "number of parameters" not in said


def test_what_is_not_here_is_said(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    said = bench("--nanogpt", str(tmp_path / "nowhere"), "training")
    assert "nanoGPT skipped: no model.py in" in said and "x-transformers skipped" in said
    assert "HF GPT-2" in said and "decoding" not in said


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--batch", "2", "9"), "--batch must be at least 1 row of 1 to 8 tokens, got [2, 9]"),
        (("--batch", "0", "8"), "got [0, 8]"),
    ],
)
def test_a_bad_option_is_named(bench, capsys, options, named):
    with pytest.raises(SystemExit) as error:
        bench(*options)
    assert error.value.code == 2 and named in capsys.readouterr().err


def test_a_step_reads_the_batch_that_was_asked_for(bench, monkeypatch):
    read = set()
    step = peers.Peer.step
    monkeypatch.setattr(
        peers.Peer, "step", lambda self, x, y, **how: (read.add((*x.shape, *y.shape)), step(self, x, y, **how))
    )
    bench("--batch", "3", "5", "training")
    assert read == {(3, 5, 3, 5)}


def test_every_peer_learns_and_decodes():
    import torch

    sizes = Sizes(vocab_size=17, block_size=8, n_layer=1, n_head=2, n_embd=16)
    tokens, targets = torch.randint(17, (2, 2, 8))
    for build in (peers.ours, peers.ours_without_cache, peers.hf_gpt2, peers.x_transformers):
        peer = build(sizes)
        before = [p.detach().clone() for p in peer.model.parameters()]
        peer.step(tokens, targets)
        assert any(not p.equal(q) for p, q in zip(peer.model.parameters(), before, strict=True)), build
        assert peer.decode(torch.zeros(1, 1, dtype=torch.long), 7).shape[1] in (7, 8), build


def test_patience_ends_a_run_after_three_rounds():
    calls = []
    seconds = timing.in_turn({"a": lambda: calls.append(1)}, 50, warmup=2, patience=0.0)
    assert len(seconds["a"]) == 3 and len(calls) == 5
