"""`make gpu` without a GPU: it says so; a dry run on the CPU leaves the same tables, marked as a dry run."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "gpu"), *options])
        return gpu.main()

    return run


def test_without_cuda_it_says_so_in_one_sentence_and_leaves_nothing(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == 2
    said = capsys.readouterr()
    assert said.err == f"no CUDA device here: the installed torch is {torch.__version__}\n" and not said.out
    assert not (tmp_path / "gpu").exists()


def test_a_dry_run_leaves_a_table_that_says_it_is_one(run, tmp_path, capfd):
    assert run("--device", "cpu", "-k", "check_logits_have_shape or 0.1M and eager") == 0
    about, *rows = map(json.loads, (tmp_path / "gpu" / "table.jsonl").read_text().splitlines())
    assert about["dry_run"] and about["device"] == "cpu"
    found = {row["name"]: row for row in rows}
    assert {row["part"] for row in rows} == {"bugs", "checks", "benchmarks"}
    bug = found["test_a_bug_is_caught_and_live[another-scale-on-the-device]"]
    assert bug["outcome"] == ("passed" if torch.cuda.is_available() else "skipped")
    step = found["bench_training_step[transformer-0.1M-eager]"]
    assert step["outcome"] == "passed" and "token/s" in step["says"] and step["seconds"] > 0
    check = [row for row in rows if row["part"] == "checks"]
    assert len(check) == 1 and "check_logits_have_shape" in check[0]["name"] and check[0]["outcome"] == "passed"
    table = (tmp_path / "gpu" / "table.md").read_text()
    assert table.startswith("# DRY RUN on cpu") and all(name in table for name in found)
    for kept in ("verdicts.jsonl", "benchmarks.json"):
        assert (tmp_path / "gpu" / kept).stat().st_size > 0
    assert f"{len(rows)} rows" in capfd.readouterr().out


def test_a_part_whose_time_is_over_is_stopped_and_says_so(tmp_path, capfd):
    (rest,) = gpu.run("checks", ["--collect-only"], tmp_path / "report.xml", until=time.monotonic())
    assert rest.outcome == "stopped" and rest.name == "the rest of the checks" and "time was over" in rest.says


def test_a_run_that_leaves_no_report_is_not_taken_for_a_pass(tmp_path, capfd):
    (rest,) = gpu.run("checks", ["--no-such-option"], tmp_path / "report.xml", until=time.monotonic() + 600)
    assert rest.outcome == "stopped" and "exit code 4" in rest.says


REPORT = """<testsuites><testsuite>
<testcase name="good" time="1.5">
  <properties><property name="benchmark" value="fast |  1 token/s"/></properties>
</testcase>
<testcase name="wrong" time="0"><failure message="two&#10;lines">trace</failure></testcase>
<testcase name="broken" time="0"><error message="no memory">trace</error></testcase>
<testcase name="absent" time="0"><skipped message="not here">trace</skipped></testcase>
<testcase name="" time="0"/>
</testsuite></testsuites>"""


def test_every_outcome_of_a_report_is_read_and_an_interrupted_test_has_none(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    rows = list(gpu.read("checks", tmp_path / "report.xml"))
    assert [(row.name, row.outcome, row.says) for row in rows] == [
        ("good", "passed", "fast | 1 token/s"),
        ("wrong", "failed", "two lines"),
        ("broken", "error", "no memory"),
        ("absent", "skipped", "not here"),
    ]
    about = {**gpu.machine("cpu"), "dry_run": False, "name": "H1", "cuda": "12"}
    lines = gpu.table(about, rows).splitlines()
    assert lines[0].startswith("# H1, torch") and "DRY" not in lines[0]
    assert lines[4] == "| checks | good | passed | 1.50 | fast \\| 1 token/s |"


def test_a_failing_row_makes_the_exit_code_one(run, monkeypatch):
    failed = gpu.Row("checks", "wrong", "failed", 0.0, "")
    monkeypatch.setattr(gpu, "run", lambda *arguments: iter([failed]))
    assert run("--device", "cpu") == 1
    monkeypatch.setattr(gpu, "run", lambda *arguments: iter([]))
    assert run("--device", "cpu") == 1
