"""No check accuses a correct model: every fast check on libraries' models and on legitimate variants of ours."""

from __future__ import annotations

import pytest

import tests.variants_of_attention  # noqa: F401
from tests.controls import CONTROLS, FAULTY
from transformer_checks.checks import all_checks
from transformer_checks.checks.run.order import check_id
from transformer_checks.checks.run.verdict import Verdict, judge

SEED = 3
# Diverse in positions, norms, masks, caches, experts and chance. The others of CONTROLS are for `make power`.
QUICK = (
    "gpt2", "llama", "mistral-sliding", "bloom", "opt", "mixtral", "gpt-neox", "phi", "torch-encoder-pre-norm",
    "x-alibi", "reference-llama", "sliding-window", "stochastic-depth", "experts-of-one", "embedding-of-limited-norm",
    "post-norm-with-scaled-embeddings", "ternary-weights", "documents-parted-by-an-end-token",
    "embedding-scaled-in-place",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", QUICK)
def test_no_check_accuses_a_correct_model(name: str):
    subject, verdicts = CONTROLS[name](seed=SEED), dict[str, Verdict]()
    for check in all_checks():
        if not hasattr(check, "slow"):
            verdict = judge(check, subject, verdicts)
            verdicts[verdict.check] = verdict
    accused = {v.check: f"{v.outcome}: {v.says}" for v in verdicts.values() if v.outcome in ("failed", "error")}
    assert not accused
    assert sum(v.outcome == "passed" for v in verdicts.values()) > 50, "most laws of a model apply to every control"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_of_a_library_is_found(name: str):
    accuser, make = FAULTY[name]
    (check,) = [check for check in all_checks() if check_id(check) == accuser]
    verdict = judge(check, make(seed=SEED), {})
    assert verdict.outcome == "failed", verdict.says
