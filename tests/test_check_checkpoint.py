"""The checkpoint checks: what they report for each bug, and for models without a trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.reference import reference_parts
from transformer_checks.checks.run.order import check_id, checks_in
from transformer_checks.checks.run.verdict import judge
from transformer_checks.checks.subject import Subject

CHECKS = {check_id(check).partition(".")[2]: check for check in checks_in("checkpoint")}
RESUMES = "check_a_resumed_training_goes_on_bit_for_bit"

SAID = [
    ("checkpoint-without-step", RESUMES, ["the learning rate of step 5", "the schedule starts again"]),
    ("checkpoint-without-rng", RESUMES, ["the first loss differs", "dropout draws other"]),
    ("resume-replays-data-order", RESUMES, ["step 5", "other examples"]),
    ("checkpoint-without-optimizer", RESUMES, ["lost its moment estimates"]),
    ("checkpoint-aliases-live-weights", "check_a_checkpoint_is_a_snapshot", ["within 2 steps", "live weights"]),
    ("saving-draws", "check_saving_changes_nothing", ["saving changes the training"]),
    ("load-not-strict", "check_other_weights_are_refused", ["a tensor missing", "without an error"]),
    ("load-half-way", "check_other_weights_are_refused", ["only after some tensors were copied"]),
    ("load-runs-code", "check_a_file_with_code_is_not_run", ["code"]),
]


@pytest.mark.parametrize(("bug", "check", "facts"), SAID, ids=[bug for bug, _, _ in SAID])
def test_a_finding_names_what_was_lost(bug, check, facts):
    """The step, the learning rate, the order, dropout or the optimizer's moments."""
    verdict = judge(CHECKS[check], all_bugs()[bug].subject(), {})
    assert verdict.outcome == "failed"
    assert not [fact for fact in facts if fact not in verdict.says], verdict.says
    assert bug in verdict.likely


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_resumes_on_any_seed(seed):
    """Bit for bit, with dropout, during an epoch, into a trainer that started from another state."""
    assert judge(CHECKS[RESUMES], Subject("transformer", reference_parts(), seed=seed), {}).outcome == "passed"


def test_the_file_with_code_leaves_nothing_behind(tmp_path, monkeypatch):
    """The code is harmless, and its folder is removed afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    judge(CHECKS["check_a_file_with_code_is_not_run"], all_bugs()["load-runs-code"].subject(), {})
    assert not list(tmp_path.iterdir())


class Lenient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False, assign=assign)


def test_a_model_that_loads_anything_fails():
    """Even if it has no checkpoints of its own; the other checks are not applicable."""
    subject = Subject("lenient", SimpleNamespace(build_model=lambda **sizes: Lenient()))
    verdict = judge(CHECKS["check_other_weights_are_refused"], subject, {})
    assert (verdict.outcome, "a tensor missing" in verdict.says) == ("failed", True)
    assert judge(CHECKS[RESUMES], subject, {}).outcome == "not_applicable"


def test_a_load_with_pickle_fails():
    """torch.load with weights_only=False runs code from the file."""
    parts = SimpleNamespace(
        build_model=reference_parts().build_model, load=lambda path: torch.load(path, weights_only=False)
    )
    assert judge(CHECKS["check_a_file_with_code_is_not_run"], Subject("pickle", parts), {}).outcome == "failed"
