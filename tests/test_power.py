"""`make power`: its rows, continuing a stopped run, a subject that kills its process, the report and its problems."""

from __future__ import annotations

import json
import os

import pytest

from power import power
from power import process as power_process
from power.process import Task
from power.report import problems, report
from transformer_checks.checks.run.order import check_id

FEW = ("check_contract.check_logits_have_shape", "check_causality.check_future_cannot_change_past",
       "check_loss.check_value_is_the_closed_form")  # fmt: skip
SUBJECTS = "bug:no-causal-mask bug:masked-mean-over-all-positions control:tied-rotary"


def row(kind, verdicts, *, named=(), ended=""):
    listed = [dict(check=check, outcome=outcome, says="7 of 9") for check, outcome in verdicts.items()]
    return dict(kind=kind, subject="it", seed=0, slow=False, named=list(named), ended=ended, verdicts=listed)


@pytest.fixture
def few(monkeypatch):
    """Only three checks, judged in this process; another test covers the child processes."""
    monkeypatch.setattr(power_process, "CHECKS", [c for c in power_process.CHECKS if check_id(c) in FEW])
    monkeypatch.setattr(power, "run", judged_here)
    monkeypatch.setattr(power, "fingerprint", lambda: "0123456789")  # one table even if a source is edited meanwhile


def judged_here(task):
    verdicts: list[dict] = []
    power_process.judge_all(task, lambda message: verdicts.append(message) if isinstance(message, dict) else None)
    return {**vars(task), "named": power_process.named(task), "ended": "", "verdicts": verdicts}


def subject(line):
    row = json.loads(line)
    return row["subject"], row["slow"]


def test_a_stopped_run_continues(few, tmp_path, capsys):
    """Two bugs and a control: an unfinished line and a crashed row are run again, finished rows are not."""
    arguments = ["--jobs", "1", "--seeds", "1", "--out", str(tmp_path), "--only", SUBJECTS]
    assert power.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 of 2 known bugs are caught" in said
    assert "| causality | 1 | 1 | 1 |" in said
    assert "0 failed and 0 error" in said

    (table,) = tmp_path.glob("*.jsonl")
    first, second, third, fourth = table.read_text(encoding="utf-8").splitlines()
    crashed = json.dumps({**json.loads(second), "ended": "killed"})
    table.write_text("\n".join([first, crashed, third, fourth[:40]]), encoding="utf-8")
    assert power.main(arguments) == 0
    again = table.read_text(encoding="utf-8").splitlines()
    assert again[0] == first
    assert sorted(map(subject, again[4:])) == sorted(map(subject, [second, fourth]))


def test_a_row_comes_out_of_a_process(monkeypatch):
    """Without replacements: a process of its own, in which the libraries' models are found."""
    got = power_process.run(Task("control", "tied-rotary", 0, slow=True))
    assert got["ended"] == ""
    assert {v["check"] for v in got["verdicts"]} >= {"check_portability.check_inductor_agrees"}


@pytest.mark.parametrize(
    ("die", "ended"),
    [
        (lambda: os.abort(), "killed by SIGABRT in check_x.check_it"),
        (lambda: os._exit(3), "exited with code 3 in check_x.check_it"),
    ],
    ids=["abort", "exit"],
)
def test_a_subject_that_dies_costs_its_own_row_only(monkeypatch, die, ended):
    def dying(task, send):
        send({"check": "check_x.check_before", "outcome": "passed"})
        send("check_x.check_it")
        die()

    monkeypatch.setattr(power_process, "judge_all", dying)
    monkeypatch.setattr(power_process, "PROCESSES", __import__("multiprocessing").get_context("fork"))
    got = power_process.run(Task("control", "tied-rotary", 0))
    assert got["ended"] == ended
    assert [v["check"] for v in got["verdicts"]] == ["check_x.check_before"]


def test_a_report_lists_the_problems():
    missed = row("bug", {"check_a.check_x": "passed", "check_b.check_y": "error"}, named=["check_b.check_y"])
    accused = row("control", {"check_a.check_x": "failed"})
    dead = row("bug", {"check_a.check_x": "failed"}, ended="killed by SIGSEGV in check_b.check_y")
    text, sound = report([missed, accused, dead], "sources 0123456789", left=7)
    assert not sound
    assert "7 more not run yet" in text
    assert "1 of 2 known bugs are caught" in text
    assert "bug:it seed 0: no check failed" in text
    assert "check_b.check_y should fail, outcome: error" in text
    assert "check_a.check_x failed: 7 of 9" in text
    assert "SIGSEGV" in text
    assert "| a.check_x | 1 | 1 | 100 % | 1 |" in text


@pytest.mark.parametrize(("outcome", "accepted"), [("blocked", True), ("passed", False)])
def test_a_named_check_may_be_blocked_if_another_caught_the_bug(outcome, accepted):
    found = problems(row("bug", {"check_a.check_x": "failed", "check_b.check_y": outcome}, named=["check_b.check_y"]))
    assert bool(found) != accepted


def test_the_sanity_checks_alone_are_counted():
    rows = [row("bug", {"check_sanity.check_x": "failed"}), row("bug", {"check_loss.check_y": "failed"})]
    assert "The two sanity checks alone catch 1 (50 %)" in report(rows, "sources 0123456789")[0]


def test_changed_sources_begin_a_new_table(tmp_path):
    for name in power.SOURCES:
        path = tmp_path / name if name.endswith(".py") else tmp_path / name / "law.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1", encoding="utf-8")
    before = power.fingerprint(tmp_path)
    assert power.fingerprint(tmp_path) == before
    (tmp_path / "checks" / "law.py").write_text("2", encoding="utf-8")
    assert power.fingerprint(tmp_path) != before


@pytest.mark.parametrize("option", ["--jobs=0", "--seeds=-1", "--seeds=two"])
def test_a_bad_number_is_named(option, capsys):
    with pytest.raises(SystemExit):
        power.main([option])
    assert option.partition("=")[2] in capsys.readouterr().err
