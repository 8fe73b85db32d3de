"""What the checks of evaluation and training mode report: which dropout, in which module, in which mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.messages import Told, expect_told
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.bugs.designs import changed
from transformer_checks.checks.check_modes import check_dropout_obeys_its_rate, check_every_dropout_site_drops
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject
from transformer_checks.transformer.model import Transformer

FOUND: dict[str, Told] = {
    "attn-dropout-in-eval": (
        "eval_repeats_itself",
        "blocks.0.attention",
        ("without a mask", "scaled_dot_product_attention with a rate of"),
        "attn-dropout-in-eval",
    ),
    "resid-dropout-in-eval": (
        "eval_repeats_itself",
        "blocks.1",
        ("two calls with the same tokens", "(dropout with a rate of", "train_and_eval_mode.py:"),
        "resid-dropout-in-eval",
    ),
    "forward-reseeds": (
        "eval_leaves_random_state_alone",
        "Reseeding",
        ("global random state of PyTorch",),
        "forward-reseeds",
    ),
    "forward-changes-weights": (
        "forward_leaves_weights_alone",
        "Normalizing",
        ("embedding.weight",),
        "forward-changes-weights",
    ),
    "train-method-forgets-a-part": (
        "modes_reach_every_part",
        "blocks.1.attention",
        ("model.eval()", "still in training mode"),
        "train-method-forgets-a-part",
    ),
    "dropout-in-a-plain-list": (
        "modes_reach_every_part",
        None,
        ("blocks.0.drops[0]", "and 1 more"),
        "dropout-in-a-plain-list",
    ),
    "other-scale-without-gradients": (
        "gradient_mode_changes_nothing",
        "blocks.0.attention",
        ("torch.no_grad()",),
        "other-scale-without-gradients",
    ),
    "training-scales-embeddings": (
        "training_computes_what_evaluation_does",
        "Scaled",
        ("without dropout",),
        "training-scales-embeddings",
    ),
    "causal-mask-dropped-on-a-branch": (
        "training_computes_what_evaluation_does",
        "blocks.0.attention",
        ("only in training do positions see later tokens",),
        "causal-mask-dropped-on-a-branch",
    ),
    "training-forward-reseeds": (
        "dropout_draws_anew",
        None,
        ("seeds the global generator of PyTorch",),
        "training-forward-reseeds",
    ),
    "dropout-from-its-own-generator": (
        "dropout_draws_anew",
        "blocks.0",
        ("with the same global seed",),
        "dropout-from-its-own-generator",
    ),
    "dropout-rate-ignored": (
        "dropout_obeys_its_rate",
        "residual",
        ("with dropout 0", "a rate of 0.5"),
        "dropout-rate-ignored",
    ),
    "dropout-without-rescaling": (
        "dropout_obeys_its_rate",
        "blocks.0.dropout",
        ("ones comes out as 0.6", "as 1 in evaluation"),
        "dropout-without-rescaling",
    ),
    "dropout-scaled-in-evaluation-too": (
        "dropout_obeys_its_rate",
        "blocks.1",
        ("a dropout of 0.3", "one of 0"),
        "dropout-scaled-in-evaluation-too",
    ),
    "attention-dropout-not-applied": (
        "every_dropout_site_drops",
        "blocks.1.attention",
        ("a dropout of 0.3", "drops nothing"),
        "attention-dropout-not-applied",
    ),
    "dropout-call-forgotten": (
        "every_dropout_site_drops",
        "embedding_dropout",
        ("embedding_dropout declares a dropout of 0.3", "drops nothing"),
        "dropout-call-forgotten",
    ),
    "dropout-mask-drawn-once": (
        "every_dropout_site_drops",
        "dropout",
        ("the same units on every call",),
        "dropout-mask-drawn-once",
    ),
    "dropout-off-forever-after-eval": (
        "dropout_survives_evaluation",
        "dropout",
        ("is 0, expected 0.3",),
        "dropout-off-forever-after-eval",
    ),
    "dropout-mask-shared-by-rows": (
        "dropout_differs_between_rows",
        "blocks.1",
        ("[1, 13, 32]", "no axis for rows"),
        "dropout-mask-shared-by-rows",
    ),
}


@pytest.mark.parametrize("bug", FOUND)
def test_a_mistake_is_told_by_its_place_and_its_cause(bug):
    expect_told("modes", bug, FOUND[bug])


def test_dropout_that_is_not_rescaled_is_legitimate_where_evaluation_scales():
    """Srivastava et al. 2014: training drops without rescaling, evaluation multiplies by 1 - p."""

    class Original(nn.Dropout):
        def forward(self, x):
            return x * (torch.rand_like(x) >= self.p) if self.training else x * (1 - self.p)

    def change(model):
        model.dropout.__class__ = Original

    found = judge(check_dropout_obeys_its_rate, Subject("original", changed(change), seed=1), {})
    assert found.outcome == "passed", found.says


class WithAnotherTask(Transformer):
    """It can also label whole texts: with a second head, and a method with its own dropout."""

    def label(self, tokens):
        return self.label_head(self.label_dropout(self.embed(tokens).mean(1)))


def another_task(model):
    rate, width = model.config.dropout, model.config.n_embd
    model.label_head = nn.Sequential(nn.Linear(width, 3), nn.Dropout(rate))
    model.label_dropout = nn.Dropout(rate)
    model.__class__ = WithAnotherTask


def test_dropout_of_another_task_is_not_missed():
    found = judge(check_every_dropout_site_drops, Subject("labels", changed(another_task), seed=2), {})
    assert found.outcome == "passed", found.says


def test_of_one_task_more_the_dropout_that_is_missed_is_named():
    parts = all_bugs()["dropout-call-forgotten"].subject().parts
    build = parts.build_model

    def build_with_another_task(**sizes):
        model = build(**sizes)
        another_task(model)
        return model

    parts.build_model = build_with_another_task
    found = judge(check_every_dropout_site_drops, Subject("labels", parts, seed=2), {})
    assert found.outcome == "failed" and found.evidence["sites"] == ["embedding_dropout"]
