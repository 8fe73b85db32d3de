"""What a file defines and no check calls is named in the header, and nothing else is."""

from __future__ import annotations

import ast

import pytest

from transformer_checks.checks.meet.source import Source
from transformer_checks.checks.meet.uncalled import uncalled
from transformer_checks.checks.run.subjects import subject_of

FILE = """
import torch
from torch import nn


class Adapter(nn.Module):
    def __init__(self, inner, rank=2):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(inner.in_features, rank), nn.Linear(rank, inner.out_features)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))

    def merge(self):
        return self.inner


class LanguageModel(nn.Module):
    def __init__(self, vocab_size, block_size, width=16):
        super().__init__()
        self.words, self.places = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.mix, self.head = Adapter(nn.Linear(width, width)), nn.Linear(width, vocab_size)
        self.apply(self._draw)

    def _draw(self, module):
        pass

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(x + self.mix(x).cumsum(dim=1))

    def beam_search(self, tokens, width):
        return ranked(tokens)


def ranked(tokens):
    return tokens


def quantize(model):
    return _rounded(model)


def _rounded(model):
    return model


def evaluate(model, tokens):
    return model(tokens).mean()


def main():
    quantize(LanguageModel(8, 8))


if __name__ == "__main__":
    main()
"""


def test_the_header_names_what_no_check_calls(tmp_path):
    (tmp_path / "model.py").write_text(FILE)
    header = subject_of(str(tmp_path / "model.py")).header
    assert "not checked: Adapter.merge, LanguageModel.beam_search, ranked, quantize" in header


def test_many_are_counted(tmp_path):
    more = "".join(f"def left_{i}():\n    pass\n\n\n" for i in range(9))
    (tmp_path / "model.py").write_text(FILE.replace("def main", more + "def main"))
    header = subject_of(str(tmp_path / "model.py")).header
    assert "ranked, quantize, left_0, left_1, 7 more that no check calls" in header


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("def f(): g()\ndef g(): pass", {"f", "g"}),
        ("def f(): g()\ndef g(): pass\nf()", set()),
        ("def f(): g()\ndef g(): pass\ndef root(): f()", set()),
        ("def root(): return getattr(root, 'g')()\ndef g(): pass", set()),
        ("class A:\n    def step(self): pass\ndef root(): A()", {"A.step"}),
        ("class A:\n    def step(self): pass\ndef root(): A().step()", set()),
        ("class A:\n    def __init__(self): self.f()\n    def f(self): pass\nclass root(A): pass", set()),
        ("class A:\n    def f(self): g()\ndef g(): pass", {"A", "g"}),
        ("def f(): pass\nif __name__ == '__main__':\n    f()", {"f"}),
        ("def f(): return open('x')\ndata = f()\nfor _ in range(9):\n    f().step()", {"f"}),
    ],
)
def test_a_name_that_is_mentioned_in_what_is_called_counts_as_called(code, left):
    assert set(uncalled(Source((ast.parse(code),), ("model.py",)), {"root"})) == left
