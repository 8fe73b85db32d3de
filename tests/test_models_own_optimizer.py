"""What is said of the groups that `configure_optimizers` makes, and which of its forms are called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.messages import expect_told
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.bugs.optimizer_and_schedule import with_its_optimizer
from transformer_checks.checks.check_optimizer import (
    check_the_models_own_optimizer_decays_matrices,
    check_the_models_own_optimizer_holds_each_parameter_once,
)
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

FOUND = {
    "decay-groups-exchanged": (
        "the_models_own_optimizer_decays_matrices",
        "configure_optimizers",
        ("biases and gains decay", "no matrix does", "The two groups are exchanged"),
        "decay-groups-exchanged",
    ),
    "group-forgets-the-last-norm": (
        "the_models_own_optimizer_holds_each_parameter_once",
        "configure_optimizers",
        ("it misses norm.weight, norm.bias, which will never be trained",),
        "group-forgets-the-last-norm",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_finding_names_the_method_and_the_parameters(bug):
    expect_told("optimizer", bug, FOUND[bug])


def of_one_group(self):
    return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


def from_a_configuration(self, train_config):
    groups = [{"params": [p], "weight_decay": train_config.weight_decay * (p.dim() > 1)} for p in self.parameters()]
    return torch.optim.AdamW(groups, lr=train_config.learning_rate, betas=train_config.betas)


def as_lightning_returns_it(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def without_decay_of_embeddings(self, weight_decay, learning_rate):
    tables = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
    decays = {id(p) for p in self.parameters() if p.dim() > 1} - tables
    groups = [{"params": [p], "weight_decay": weight_decay * (id(p) in decays)} for p in self.parameters()]
    return torch.optim.AdamW(groups, lr=learning_rate)


def needs_more(self, steps):
    raise AssertionError("never called")


def crashes(self):
    raise RuntimeError("no trainer")


@pytest.mark.parametrize(
    ("method", "outcome", "says"),
    [
        (of_one_group, "passed", ""),
        (from_a_configuration, "passed", ""),
        (as_lightning_returns_it, "passed", ""),
        (without_decay_of_embeddings, "passed", ""),
        (needs_more, "not_applicable", "what its optimizer needs as steps is not known"),
        (crashes, "not_applicable", "configure_optimizers cannot be called alone: RuntimeError: no trainer"),
        (None, "not_applicable", "no method that makes its optimizer"),
    ],
)
def test_other_forms_are_called_or_said_not_to_be(method, outcome, says):
    def change(model):
        if method is not None:
            model.__class__ = type("Own", (type(model),), {"configure_optimizers": method})

    subject = Subject("own", changed(change))
    for check in (
        check_the_models_own_optimizer_holds_each_parameter_once,
        check_the_models_own_optimizer_decays_matrices,
    ):
        found = judge(check, subject, {})
        assert found.outcome == outcome and says in found.says, found.says


def test_the_design_is_right():
    subject = Subject("own", with_its_optimizer())
    assert judge(check_the_models_own_optimizer_decays_matrices, subject, {}).outcome == "passed"
