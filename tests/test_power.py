"""The long run: its rows, going on where it was stopped, a subject that dies, and a report that says what is amiss."""

from __future__ import annotations

import json
import os

import pytest

from power import power
from power import process as power_process
from power.process import Task
from power.report import report, wrong
from transformer_checks.checks.run.order import check_id

FEW = ("check_contract.check_logits_have_shape", "check_causality.check_future_cannot_change_past",
       "check_loss.check_value_is_the_closed_form")  # fmt: skip
SUBJECTS = "bug:no-causal-mask bug:masked-mean-over-all-positions control:tied-rotary"


def row(kind, verdicts, *, named=(), ended=""):
    listed = [dict(check=check, outcome=outcome, says="7 of 9") for check, outcome in verdicts.items()]
    return dict(kind=kind, subject="it", seed=0, slow=False, named=list(named), ended=ended, verdicts=listed)


@pytest.fixture
def few(monkeypatch):
    """Three checks, in this process: the processes have a test of their own."""
    monkeypatch.setattr(power_process, "CHECKS", [c for c in power_process.CHECKS if check_id(c) in FEW])
    monkeypatch.setattr(power, "run", judged_here)


def judged_here(task):
    verdicts: list[dict] = []
    power_process.judge_all(task, lambda said: verdicts.append(said) if isinstance(said, dict) else None)
    return {**vars(task), "named": power_process.named(task), "ended": "", "verdicts": verdicts}


def subject(line):
    row = json.loads(line)
    return row["subject"], row["slow"]


def test_a_run_goes_on_where_it_was_stopped(few, tmp_path, capsys):
    """Two bugs and a control; what half a line or a crash left is run again, what is there is not."""
    arguments = ["--jobs", "1", "--seeds", "1", "--out", str(tmp_path), "--only", SUBJECTS]
    assert power.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 of 2 known bugs are caught" in said
    assert "| causality | 1 | 1 | 1 |" in said
    assert "0 failed and 0 were errors" in said

    (table,) = tmp_path.glob("*.jsonl")
    first, second, third, fourth = table.read_text(encoding="utf-8").splitlines()
    crashed = json.dumps({**json.loads(second), "ended": "killed"})
    table.write_text("\n".join([first, crashed, third, fourth[:40]]), encoding="utf-8")
    assert power.main(arguments) == 0
    again = table.read_text(encoding="utf-8").splitlines()
    assert again[0] == first
    assert sorted(map(subject, again[4:])) == sorted(map(subject, [second, fourth]))


def test_a_row_comes_out_of_a_process(monkeypatch):
    """The real way: a process of its own, the library's models and their names found in it."""
    got = power_process.run(Task("control", "tied-rotary", 0, slow=True))
    assert got["ended"] == ""
    assert {v["check"] for v in got["verdicts"]} >= {"check_portability.check_inductor_agrees"}


@pytest.mark.parametrize(
    ("die", "ended"),
    [
        (lambda: os.abort(), "killed by SIGABRT in check_x.check_it"),
        (lambda: os._exit(3), "ended itself with exit code 3 in check_x.check_it"),
    ],
    ids=["abort", "exit"],
)
def test_a_subject_that_dies_costs_its_own_row_only(monkeypatch, die, ended):
    def dying(task, say):
        say({"check": "check_x.check_before", "outcome": "passed"})
        say("check_x.check_it")
        die()

    monkeypatch.setattr(power_process, "judge_all", dying)
    monkeypatch.setattr(power_process, "PROCESSES", __import__("multiprocessing").get_context("fork"))
    got = power_process.run(Task("control", "tied-rotary", 0))
    assert got["ended"] == ended
    assert [v["check"] for v in got["verdicts"]] == ["check_x.check_before"]


def test_a_report_says_what_is_amiss():
    missed = row("bug", {"check_a.check_x": "passed", "check_b.check_y": "error"}, named=["check_b.check_y"])
    accused = row("control", {"check_a.check_x": "failed"})
    dead = row("bug", {"check_a.check_x": "failed"}, ended="killed by SIGSEGV in check_b.check_y")
    text, sound = report([missed, accused, dead], "sources 0123456789", left=7)
    assert not sound
    assert "7 more are not yet run" in text
    assert "1 of 2 known bugs are caught" in text
    assert "caught by no check" in text
    assert "check_b.check_y error, and is named to catch it" in text
    assert "check_a.check_x failed: 7 of 9" in text
    assert "SIGSEGV" in text
    assert "| a.check_x | 1 | 1 | 100 % | 1 |" in text


def test_a_named_check_may_be_blocked_where_another_caught_the_bug():
    assert not wrong(row("bug", {"check_a.check_x": "failed", "check_b.check_y": "blocked"}, named=["check_b.check_y"]))
    assert wrong(row("bug", {"check_a.check_x": "failed", "check_b.check_y": "passed"}, named=["check_b.check_y"]))


def test_the_sanity_checks_alone_are_counted():
    rows = [row("bug", {"check_sanity.check_x": "failed"}), row("bug", {"check_loss.check_y": "failed"})]
    assert "The two sanity checks alone catch 1 (50 %)" in report(rows, "sources 0123456789")[0]


def test_another_source_begins_another_table(tmp_path):
    for name in power.SOURCES:
        path = tmp_path / name if name.endswith(".py") else tmp_path / name / "law.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1", encoding="utf-8")
    before = power.fingerprint(tmp_path)
    assert power.fingerprint(tmp_path) == before
    (tmp_path / "checks" / "law.py").write_text("2", encoding="utf-8")
    assert power.fingerprint(tmp_path) != before


@pytest.mark.parametrize("option", ["--jobs=0", "--seeds=-1", "--seeds=two"])
def test_a_number_that_is_none_is_named(option, capsys):
    with pytest.raises(SystemExit):
        power.main([option])
    assert option.partition("=")[2] in capsys.readouterr().err
