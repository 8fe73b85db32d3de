"""The measurement of whole runs: what a process took, how it ended, and the line that says so."""

from __future__ import annotations

import sys

import pytest

from benchmarks import suite
from benchmarks.suite import Run, line, process


def test_a_process_is_measured_and_its_last_line_kept(tmp_path):
    script = "x = b'x' * 200_000_000; s = sum(range(20_000_000)); print('3 passed; 3 of 4 checks ran'); print('end')"
    run = process([sys.executable, "-c", script], tmp_path)
    assert run.ended == "3 passed; 3 of 4 checks ran"
    assert 0.05 < run.seconds < 60 and run.memory > 2e8
    assert process([sys.executable, "-c", "raise SystemExit(3)"], tmp_path).ended == "ended with 3"


def test_patience_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "PATIENCE", 0.5)
    assert process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path).ended == "ended with 124"


@pytest.mark.parametrize(
    ("before", "end"),
    (
        ([Run(10.0, 0, "4 passed")], "0.40   equal"),
        ([Run(10.0, 0, "3 passed")], "0.40   4 passed (before: 3 passed)"),
        ([], "4 passed"),
    ),
)
def test_a_line_compares_two_versions(before, end):
    said = line("124 M instance", [Run(4.0, 5e9, "4 passed")], before, 2e9)
    assert said.startswith("124 M instance") and "4.0 s" in said and "3.00 GB" in said and said.endswith(end)


def test_every_subject_is_named(tmp_path):
    names = [name for name, *_ in suite.subjects(tmp_path, "nanoGPT")]
    assert names == ["the reference", "nanoGPT's model.py", "transformers' GPT-2", "10.7 M instance", "124 M instance"]
