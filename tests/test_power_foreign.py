"""`python -m power.foreign`: every form is right, every edit is made somewhere, and a few bugs are caught there."""

from __future__ import annotations

import ast
from dataclasses import asdict, replace

import pytest

from power.foreign import FOLDER, FORMS, measure, source_of
from power.foreign import __main__ as run
from power.foreign.edits import all_edits
from power.foreign.measure import Case, edit_for, forms_of, judged, with_needs
from transformer_checks.checks import check_model
from transformer_checks.checks.bugs import all_bugs


@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_right(form):
    """With its architecture declared, no check fails."""
    report = check_model(str(FOLDER / f"{form}.py"), seed=3, spec=FORMS[form])
    assert not {v.check for v in report if v.outcome in ("failed", "error")}


def test_every_form_is_measured():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(FORMS)


def test_every_edit_makes_a_known_bug_in_some_form():
    for bug in all_edits():
        assert bug in all_bugs()
        made = [(edit_for(bug, form), form) for form in forms_of(bug)]
        assert made, bug
        for edit, form in made:
            text = edit.made_in(source_of(form))
            ast.parse(text)
            assert text != source_of(form)


def test_most_bugs_are_in_three_forms():
    assert sum(len(forms_of(bug)) >= 3 for bug in all_edits()) >= 300


CAUGHT = (
    ("no-causal-mask", "hf_like"),
    ("softmax-over-queries", "einsum_gpt"),
    ("cache-rows-mixed", "hf_like"),
    ("stops-when-any-row-eos", "hf_llama"),
    ("masked-mean-over-all-positions", "homework"),
    ("step-uphill", "nanogpt"),
    ("norm-over-sequence", "rotary_einsum"),
    ("nll-of-raw-logits", "nanogpt"),
    ("naive-log-of-softmax", "hf_llama"),
    ("positions-start-again-at-128", "homework"),
    ("dropout-inside-the-feed-forward", "homework"),
)


@pytest.mark.parametrize(("bug", "form"), CAUGHT)
def test_a_bug_is_caught_by_its_check(bug, form):
    row = judged(Case(bug, form), everything=False)
    assert row["result"] == "its check" and row["check"] in all_bugs()[bug].caught_by
    assert row["likely"]


def test_a_bug_that_its_checks_miss_goes_to_all_others(monkeypatch):
    """Without the checks of the future, another one must catch the missing mask."""
    monkeypatch.setattr(measure, "CHECKS", {k: v for k, v in measure.CHECKS.items() if "future" not in k})
    assert judged(Case("no-causal-mask", "nanogpt"), everything=False)["result"] == "missed"
    assert judged(Case("no-causal-mask", "nanogpt"))["result"] in ("kin", "another check")


def test_a_file_that_cannot_be_loaded_is_refused(monkeypatch):
    monkeypatch.setattr(Case, "source", "x = 1\n")
    row = judged(Case("no-causal-mask", "nanogpt"))
    assert row["result"] == "refused" and row["says"]


def test_what_is_only_remarked_is_advice():
    """A right form has no such remark; whether a model clips by value or by norm is its author's choice."""
    row = judged(Case("clip-by-value", "llama"), everything=False)
    assert row["result"] == "advice" and "clip" in row["says"] and not row["check"]
    assert not measure.advice(Case("step-uphill", "llama"))


def test_needed_checks_come_first():
    needy = "check_cache.check_cached_decoding_equals_full"
    order = with_needs([needy])
    assert needy in order and all(order.index(n) < order.index(needy) for n in measure.CHECKS[needy].needs)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """What is in the file is not judged again; with another seed, or undeclared, it is another case."""
    monkeypatch.setattr(run, "judged", lambda case: {**asdict(case), "result": "missed", "check": "", "likely": False})
    cases, out = [Case(bug, form, 4) for bug, form in run.chosen(0, 3, 2)], tmp_path / "rows.jsonl"
    first = run.measured(cases[:2], out)
    assert run.measured(cases, out)[:2] == first
    assert len(out.read_text().splitlines()) == len(cases) == 6
    run.measured([replace(cases[0], declared=False)], out)
    assert len(out.read_text().splitlines()) == 7


def test_drawn_bugs_and_forms_are_the_same_each_time():
    assert run.chosen(0, None, 3)[:9] == run.chosen(0, 3, 3)
    assert {bug for bug, _ in run.chosen(0, None, 0)} == set(all_edits())
    assert {form for _, form in run.chosen(0, None, 0, only="scale-missing")} == set(FORMS)


def test_the_report_counts_what_was_caught_and_shows_what_was_not():
    caught = {"bug": "a", "form": "llama", "result": "kin", "check": "check_x.check_y_holds", "likely": True}
    missed = {"bug": "a", "form": "nanogpt", "result": "missed", "check": "", "likely": False}
    said = run.report([caught, missed])
    assert "1 bugs in 2 forms, 2 files: 1 caught (50.0%), 1 of them by name" in said
    assert "llama: 1 of 1 caught" in said
    assert said.splitlines()[-1].startswith("| a | MISSED |") and "y_holds*" in said


def test_damaged_text_differs_in_one_place():
    old, new = source_of("llama").splitlines(), Case("scale-missing", "llama").source.splitlines()
    assert [n for n, (a, b) in enumerate(zip(old, new, strict=True)) if a != b] == [
        next(n for n, line in enumerate(old) if "self.scale = " in line)
    ]
