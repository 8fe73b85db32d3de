"""Two sets of verdicts compared: equal ones, every kind of difference, both formats, files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from power import same
from transformer_checks.checks.expect import Where
from transformer_checks.checks.report import lines
from transformer_checks.checks.run.verdict import Verdict

CAUSAL, SHAPE = "check_causality.check_future_cannot_change_past", "check_contract.check_logits_have_shape"
PLACE = Where("blocks.0.attention", "Attention", "model.py", 29)


def verdicts(outcome="failed", *, where=PLACE, likely=("no-causal-mask", "mask-shifted")):
    """A check that passed, and one that failed."""
    failed = Verdict(CAUSAL, "causality", outcome, "a rule", says="7 of 9", where=where, likely=likely)
    return [Verdict(SHAPE, "contract", "passed", "a rule", seconds=0.1), failed]


def verdict_file(path: Path, *found: Verdict, subject="bug:no-causal-mask") -> str:
    """What `--verdicts` writes: a line before each check, its verdict, a summary."""
    records = []
    for verdict in found:
        records += [lines.started(verdict.check, subject), {"subject": subject, **verdict.as_dict()}]
    records += [lines.summary(subject, [verdict.as_dict() for verdict in found], len(found)), {"ended": 0}]
    path.write_text("".join(lines.line(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def power_table(path: Path, *found: Verdict, seeds=(0,)) -> str:
    """What `make power` writes: one row per subject and seed."""
    from power.process import brief

    rows = [
        dict(kind="bug", subject="no-causal-mask", seed=seed, slow=False, named=[CAUSAL], seconds=1.0, ended="",
             verdicts=[brief(verdict) for verdict in found])
        for seed in seeds
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


FORMATS = pytest.mark.parametrize("write", [verdict_file, power_table])
BOTH = pytest.mark.parametrize("other", [verdict_file, power_table])


@FORMATS
@BOTH
def test_equal_verdicts(write, other, tmp_path, capsys):
    """In either format; the message, the line and the order of the likely causes may differ."""
    before = write(tmp_path / "before", *verdicts())
    moved = Where(PLACE.module, PLACE.type, PLACE.file, 31)
    after = other(tmp_path / "after", *verdicts(where=moved, likely=("mask-shifted", "no-causal-mask")))
    assert same.main([before, after]) == 0
    assert capsys.readouterr().out == "2 verdicts of 1 subject: all equal\n"


CHANGED = {
    "outcome": (verdicts("error"), ["outcome: failed → error"]),
    "place": (verdicts(where=Where("blocks.1.attention", "Attention")), ["blocks.0.attention → blocks.1.attention"]),
    "no place": (verdicts(where=None), ["place: blocks.0.attention → none"]),
    "likely": (verdicts(likely=("no-causal-mask",)), ["likely: mask-shifted, no-causal-mask → no-causal-mask"]),
    "two at once": (verdicts(where=None, likely=()), ["place: ", "likely: ", "→ none"]),
}


@FORMATS
@BOTH
@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_printed(name, write, other, tmp_path, capsys):
    after, facts = CHANGED[name]
    assert same.main([write(tmp_path / "before", *verdicts()), other(tmp_path / "after", *after)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith(f"bug:no-causal-mask {CAUSAL}: ")
    assert all(fact in line for fact in facts)
    assert last == "2 verdicts of 1 subject: 1 differs"


@FORMATS
@BOTH
def test_a_missing_verdict_counts_on_either_side(write, other, tmp_path, capsys):
    whole, part = write(tmp_path / "whole", *verdicts()), other(tmp_path / "part", verdicts()[0])
    assert same.main([whole, part]) == 1
    assert f"{CAUSAL}: only in BEFORE: failed" in capsys.readouterr().out
    assert same.main([part, whole]) == 1
    assert f"{CAUSAL}: only in AFTER: failed" in capsys.readouterr().out


def test_seeds_are_subjects_of_their_own(tmp_path, capsys):
    one, two = power_table(tmp_path / "one", *verdicts()), power_table(tmp_path / "two", *verdicts(), seeds=(0, 3))
    assert same.main([one, two]) == 1
    assert f"bug:no-causal-mask seed 3 {SHAPE}: only in AFTER: passed" in capsys.readouterr().out


def test_the_last_row_of_a_subject_counts(tmp_path):
    """A row that was run again replaces the earlier one whole; an unfinished line is ignored."""
    table, again = tmp_path / "table", tmp_path / "again"
    power_table(table, *verdicts())
    power_table(again, verdicts()[0])
    table.write_text(table.read_text() + again.read_text() + again.read_text()[:40], encoding="utf-8")
    assert same.main([str(table), str(again)]) == 0


@pytest.mark.parametrize("content", [None, "", "not JSON\n", '{"ended": 0}\n'])
def test_a_file_without_verdicts_is_an_error(content, tmp_path, capsys):
    good, bad = verdict_file(tmp_path / "good", *verdicts()), tmp_path / "bad"
    if content is not None:
        bad.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        same.main([good, str(bad)])
    assert ended.value.code == 2
    assert str(bad) in capsys.readouterr().err
