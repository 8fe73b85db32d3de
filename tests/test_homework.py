"""Correct homework in the styles in which students write it: no check may fail, and both sanity checks must decide."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from transformer_checks.checks import check_model
from transformer_checks.checks.loss.forms import loss_in

HOMEWORK = Path(__file__).parent / "homework"
FILES = sorted(HOMEWORK.glob("*.py"))
TOO_SMALL = {"no_arguments"}  # for the sentence of the sanity checks: its vocabulary is four words


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_check_fails_on_correct_homework(file, tmp_path):
    """The file is in a folder of its own, as a student has it."""
    report = check_model(str(shutil.copy(file, tmp_path)), seed=3)
    assert not {v.check: v.says for v in report if v.outcome in ("failed", "error")}
    sanity = [v.outcome for v in report if v.theme == "sanity"]
    assert sanity == ["not_applicable" if file.stem in TOO_SMALL else "passed"] * 2


def test_the_loss_is_found_by_its_parameters(tmp_path):
    """It is called compute_loss. Divided by all positions instead of the unmasked ones, it fails the check."""
    source = (HOMEWORK / "post_norm_by_hand.py").read_text()
    wrong = tmp_path / "homework.py"
    wrong.write_text(source.replace("(loss * mask).sum() / mask.sum()", "(loss * mask).mean()"))
    report = check_model(str(wrong), checks=["loss"], seed=3)
    failed = {v.check: v.likely for v in report if v.outcome == "failed"}
    assert failed == {"check_loss.check_value_is_the_closed_form": ("masked-mean-over-all-positions",)}


def test_a_softmax_before_cross_entropy_is_reported_at_the_line_of_the_loss(tmp_path):
    """A model that returns probabilities on purpose, with a loss for them, is not reported."""
    source = (HOMEWORK / "encoder_layer.py").read_text()
    source = source.replace("src_mask=mask))", "src_mask=mask)).softmax(-1)")
    twice, meant = tmp_path / "twice.py", tmp_path / "meant.py"
    twice.write_text(source)
    meant.write_text(
        source.replace("nn.CrossEntropyLoss()", "lambda p, t: -torch.log(p.gather(-1, t[:, None])).mean()")
    )
    checks = ["check_loss_takes_what_the_model_gives", "check_memorizes_the_sentence"]
    told = check_model(str(twice), checks=checks, seed=3)
    assert [(v.outcome, v.likely, v.where.line) for v in told] == [("failed", ("softmax-twice",), 29)] * 2
    assert not [v for v in check_model(str(meant), checks=checks, seed=3) if v.likely]


@pytest.mark.parametrize(
    ("found", "defined"),
    [
        ("masked_loss", "def full_loss(logits, targets): ...\ndef masked_loss(logits, targets, mask): ..."),
        (None, "def first_loss(logits, targets): ...\ndef second_loss(logits, targets): ..."),
        (None, "def plot_loss(outputs, targets): ..."),
        (None, "def train_loss(model, batch): ..."),
        ("cross_entropy", "def cross_entropy(pred, y): ..."),
    ],
)
def test_of_several_losses_the_masked_one_is_taken(found, defined):
    scope = {"__name__": "homework"}
    exec(defined, scope)
    assert loss_in(scope, "homework") == found
