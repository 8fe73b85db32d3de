"""Branches left out by rows must keep their mean, however that is written; layers skipped by whole batches need not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from transformer_checks.checks.check_randomness import check_random_branches_keep_their_mean
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

P = 0.2


class Path(nn.Module):
    """Leaves out its input by rows; multiplies what is kept by `kept`, and by `calm` in evaluation."""

    def __init__(self, kept: float = 1.0, calm: float = 1.0, *, whole: bool = False, entries: bool = False):
        super().__init__()
        self.kept, self.calm, self.whole, self.entries = kept, calm, whole, entries

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.calm
        shape = x.shape if self.entries else (1 if self.whole else len(x), 1, 1)
        return x * torch.empty(shape).bernoulli_(1 - P) * self.kept


class Rate(Path):
    """Its rate is an attribute, which is zero unless it is asked for."""

    def __init__(self, kept: bool):
        super().__init__()
        self.drop_prob, self.rescales = 0.0, kept

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        mask = (torch.rand(len(x), 1, 1) >= self.drop_prob).to(x)
        return x * mask / (1 - self.drop_prob) if self.rescales else x * mask


class Layer(nn.Module):
    def __init__(self, C: int, path: nn.Module):
        super().__init__()
        self.first, self.second, self.path = nn.Linear(C, C), nn.Linear(C, C), path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.first(x.cumsum(1)).tanh())
        return x + self.path(self.second(x).relu())


class Inline(Layer):
    """The same in its own forward, with a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.left(self.first(x.cumsum(1)).tanh())
        return x + self.left(self.second(x).relu())

    def left(self, update: Tensor) -> Tensor:
        return update * (torch.rand(len(update)) >= P)[:, None, None] * self.path.kept if self.training else update


class Chosen(Layer):
    """Only the rows that are kept go through the branch."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x)) >= P if self.training else torch.ones(len(x), dtype=torch.bool)
        x = x.clone()
        x[kept] = x[kept] + self.first(x[kept].cumsum(1)).tanh() * (self.path.kept if self.training else 1)
        return x


def verdict(path: nn.Module, layer: type[Layer] = Layer) -> Verdict:
    class Model(nn.Module):
        def __init__(self, sizes: dict[str, int]):
            super().__init__()
            self.embedding = nn.Embedding(sizes["vocab_size"], sizes["n_embd"])
            self.layers = nn.ModuleList(layer(sizes["n_embd"], path) for _ in range(sizes["n_layer"]))
            self.head = nn.Linear(sizes["n_embd"], sizes["vocab_size"])

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for each in self.layers:
                x = each(x)
            return self.head(x)

    subject = Subject("toy", SimpleNamespace(build_model=lambda **sizes: Model(sizes)), seed=2)
    return judge(check_random_branches_keep_their_mean, subject, {})


WRONG = {
    "a module": (Path(), Layer, "layers.0.path"),
    "a module with a rate": (Rate(kept=False), Layer, "layers.0.path"),
    "a function": (Path(), Inline, "layers.0"),
    "rows that are chosen": (Path(), Chosen, "layers.0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_branch_that_is_not_rescaled_is_found(kind):
    path, layer, place = WRONG[kind]
    found = verdict(path, layer)
    assert found.outcome == "failed" and found.where.module == place
    assert 0.1 < found.evidence["share"] < 0.5


RIGHT = {
    "rescaled": (Path(1 / (1 - P)), Layer),
    "rescaled by a rate": (Rate(kept=True), Layer),
    "scaled down in evaluation": (Path(1.0, 1 - P), Layer),
    "rescaled by a function": (Path(1 / (1 - P)), Inline),
    "rescaled rows that are chosen": (Path(1 / (1 - P)), Chosen),
    "skipped by the whole batch": (Path(whole=True), Layer),
    "nothing random": (Path(0.0, 0.0), Layer),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_branches_that_keep_their_mean_or_skip_by_the_batch_pass(kind):
    assert verdict(*RIGHT[kind]).outcome in ("passed", "not_applicable")


def test_rescaled_branches_are_judged_and_not_passed_over():
    assert verdict(*RIGHT["rescaled"]).outcome == "passed"
