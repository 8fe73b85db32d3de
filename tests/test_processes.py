"""Several processes find what one finds: the same verdicts, the same root, the same order, all artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transformer_checks.checks.run.order import all_listed

LEAKING = """
import torch
from torch import nn


class Model(nn.Module):
    '''Attends to the future; changes its input.'''

    def __init__(self, vocab_size, block_size, n_embd=32):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.attention = nn.MultiheadAttention(n_embd, 4, batch_first=True)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        tokens[:, 0] = 0
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])
"""
SOME = "check_contract or check_causality or check_modes"


class Ran:
    """A run in processes of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        verdicts = folder / f"{len(list(folder.iterdir()))}.jsonl"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--seed", "3", "--verdicts", str(verdicts)]
        done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)
        self.code, self.said = done.returncode, done.stdout
        records = [json.loads(line) for line in verdicts.read_text().splitlines()]
        self.verdicts = [record for record in records if "check" in record]
        self.summaries = [record["summary"] for record in records if "summary" in record]

    def outcomes(self) -> dict[str, tuple[str, str, str]]:
        return {v["check"]: (v["outcome"], v["says"], str(v["where"])) for v in self.verdicts}

    def end(self) -> list[str]:
        """What is printed after the failures, and the order of these."""
        lines = self.said.splitlines()
        end = [n for n, line in enumerate(lines) if line.strip("-= ") in ("model.py", "transformer")]
        return [line for line in lines[end[-1] :] if not line.startswith("=")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Alone and in three processes, which judge a chain of checks that need each other apart."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "model.py").write_text(LEAKING)
    options = ("--model", "model.py", "-k", SOME)
    return Ran(folder, *options), Ran(folder, *options, "-n", "3")


def test_each_check_has_the_verdict_that_it_has_alone(runs):
    alone, together = runs
    assert together.outcomes() == alone.outcomes()
    assert {"failed", "blocked", "passed"} <= {outcome for outcome, *_ in alone.outcomes().values()}
    assert together.code == alone.code == 1


def test_each_check_is_reported_once_and_all_are_counted(runs):
    alone, together = runs
    checks = [verdict["check"] for verdict in together.verdicts]
    assert len(checks) == len(set(checks)) == len(alone.verdicts)
    assert together.summaries == alone.summaries and alone.summaries[0]["total"] == len(all_listed())


def test_root_and_order_of_the_findings_are_the_same(runs):
    alone, together = runs
    assert together.end() == alone.end()
    assert any(line.startswith("start with check_") for line in alone.end())


def test_the_model_is_named_once(runs):
    for run in runs:
        assert run.said.count("\nmodel: model.py:Model · ") == run.said.count("\nseed: 3\n") == 1


def test_a_model_that_cannot_be_loaded_is_a_usage_error(tmp_path):
    command = [sys.executable, "-m", "pytest", "--model", "nowhere.py", "-n", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 4
    assert "no file nowhere.py" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_the_first_finding_is_printed_as_it_is_found(runs):
    for run in runs:
        before, _, after = run.said.partition("= FAILURES =")
        assert before.count("✗ check_") == 1 and after.count("shown above, as it was found") == 1


def test_the_artifacts_of_the_sanity_checks_are_written(tmp_path):
    run = Ran(tmp_path, "--model", "transformer", "-m", "sanity", "-n", "2")
    assert run.code == 0, run.said
    assert "report: out/report.md" in run.said
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.md", "comparison.png", "sanity_check_1/checkpoint.pt", "sanity_check_2/loss.png"} <= files
    assert (tmp_path / "out" / "report.md").read_text().count("## Sanity check") == 2


def test_what_failed_last_is_selected_in_several_processes_too(tmp_path):
    (tmp_path / "model.py").write_text(LEAKING)
    options = ("--model", "model.py", "-k", SOME, "-n", "2", "-p", "cacheprovider")
    failed = {
        check for check, (outcome, *_) in Ran(tmp_path, *options).outcomes().items() if outcome in ("failed", "error")
    }
    assert failed and set(Ran(tmp_path, *options, "--lf").outcomes()) == failed


def test_a_process_that_dies_costs_its_check_only(tmp_path):
    dies = "        if tokens.shape[1] == 5: import os; os.abort()\n"
    (tmp_path / "model.py").write_text(LEAKING.replace("        tokens[:, 0] = 0\n", dies))
    three = "check_contract and (check_logits or check_every_length_is_read)"
    run = Ran(tmp_path, "--model", "model.py", "-k", three, "-n", "2")
    assert run.code == 1
    assert "crashed while running" in run.said and "not green: no verdict from 1 of the checks" in run.said
    assert sorted(run.outcomes()) == [
        "check_contract.check_logits_are_finite",
        "check_contract.check_logits_have_shape",
    ]
