"""`make mutants`: each mutant is one change that compiles, and crashes, equal programs, catches and survivors are told
apart.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from power import mutants as run
from power.mutations import distinct, mutants, negated

FILE = Path(__file__).parent / "foreign" / "separate_heads.py"
SOURCE = '''
"""A docstring with 3 words."""
LIMIT = 7

class Layer:
    def forward(self, x, é: int = 2):
        """Another with 4."""
        assert x > 0, "not negative"
        x += self.gain(x, 1) if not self.off else -x[1:]
        self.log(x)
        return x.softmax(dim=-1) @ x
'''


def made() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for mutant in (*mutants(SOURCE), *negated(SOURCE)):
        found.setdefault(mutant.kind, []).append(mutant.new)
    return found


def test_each_mutant_is_one_change_of_the_text():
    for mutant in mutants(SOURCE):
        ast.parse(mutant.source)
        assert mutant.source.count("\n") == SOURCE.count("\n")
        line = SOURCE.splitlines()[mutant.line - 1]
        assert mutant.old.splitlines()[0] in line
        assert mutant.source.splitlines()[mutant.line - 1] != line


def test_every_kind_of_change_is_made():
    found = made()
    assert found["operands swapped"] == ["(x @ x.softmax(dim=-1))"]
    assert found["operator replaced"] == ["x -= self.gain(x, 1) if not self.off else -x[1:]"]
    assert "(self.off)" in found["`not` removed"] and "(x[1:])" in found["minus sign removed"]
    assert found["branches swapped"] == ["(-x[1:] if not self.off else self.gain(x, 1))"]
    assert found["arguments swapped"] == ["self.gain(1, x)"]
    assert found["argument dim dropped"] == ["x.softmax()"]
    assert set(found["slice + 1"]) == {"1 + 1:"} and set(found["slice - 1"]) == {"1 - 1:"}
    assert found["statement dropped"] == ["pass", "pass"]
    assert found["condition negated"] == ["(not (not self.off))"]
    assert "(3)" in found["constant + 1"] and "(0)" in found["constant - 1"]


WRITTEN_DIFFERENTLY = """
class Layer:
    def start(self, w, k):
        if not self.off:
            init.normal_(w)
        if k is None:
            k = w
        if k not in w:
            self.x[k] = self.apply(self.start)
"""


def test_one_program_written_in_several_ways_counts_once():
    """A bare name left of a call equals `pass`; `not not x` equals `x`; `not (k is None)` equals `k is not None`."""
    every = [*mutants(WRITTEN_DIFFERENTLY), *negated(WRITTEN_DIFFERENTLY)]
    kept = distinct(every)
    told = {(m.line, m.kind, m.new) for m in kept}
    assert len({m.source for m in kept}) == len(kept)
    assert {new for line, _, new in told if line == 5} == {"pass"}  # (w) and (init) are the same program
    assert {new for line, _, new in told if line == 4} == {"(self.off)"}
    assert {new for line, _, new in told if line == 6} == {"k is not None"}
    assert {new for line, _, new in told if line == 8} == {"k in w"}
    assert {new for line, _, new in told if line == 9} == {"(self.start)", "pass"}  # in an assignment they differ


def test_an_expression_that_calls_something_is_not_pass():
    calls = "def f(x):\n    g(h(x))\n"
    assert [m.new for m in distinct(mutants(calls))] == ["pass", "(h(x))", "(x)"]


def test_docstrings_assertions_and_module_level_code_stay():
    changed = {mutant.line for mutant in mutants(SOURCE)}
    assert changed.isdisjoint({2, 3, 7, 8})


def results(tmp_path: Path, *options: str) -> list[dict]:
    assert run.main([str(FILE), "--out", str(tmp_path), *options]) == 0
    return [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]


@pytest.fixture
def few(monkeypatch):
    """Three mutants whose result is known."""
    known = {
        "operator, scores": lambda m: (
            m.kind == "operator replaced" and "transpose" in m.old and "-0.5" in m.old.replace(" ", "")
        ),
        "mask": lambda m: m.kind == "method call dropped" and "masked_fill" in m.old and "softmax" not in m.old,
        "activation": lambda m: m.kind == "statement dropped" and m.old.startswith("self.net"),
    }
    every = run.mutants(FILE.read_text())
    chosen = {name: next(m for m in every if fits(m)) for name, fits in known.items()}
    monkeypatch.setattr(run, "mutants", lambda source: list(chosen.values()))
    monkeypatch.setattr(run, "negated", lambda source: [])
    return {name: m.id for name, m in chosen.items()}


def test_mutants_are_judged_and_a_run_continues(few, tmp_path, capsys):
    first = {r["id"]: r for r in results(tmp_path, "--laws", "causality")}
    assert first[few["operator, scores"]].get("check", "").startswith("check_spec.")
    assert first[few["mask"]]["check"].startswith("check_causality.")
    assert first[few["activation"]]["result"] == "crashes"
    said = capsys.readouterr().out
    assert "2 live mutants: the laws alone catch 1 (50%), with the declared spec 2 (100.0%)" in said
    # its initialization is not GPT-2's
    assert "unchanged file: gpt2; failing checks: check_spec.check_initialization_is_the_familys" in said
    assert {r["id"]: r for r in results(tmp_path, "--laws", "causality")} == first
    assert "0 left to judge" in capsys.readouterr().out


BEFORE = {"output head": "tied", "number of biases and gains": "9"}


@pytest.mark.parametrize(
    ("changed", "now", "why"),
    [
        (
            ["logits of 5"],
            {"output head": "untied", "number of biases and gains": "9"},
            "the family allows either: output head (tied → untied)",
        ),
        (["text", "text, hot"], BEFORE, "only a default value in generate changes"),
        (["with targets"], BEFORE, "only the output with targets changes"),
        (["logits of 5", "alone"], BEFORE, "same architecture, the weights are arranged differently"),
        (["2 layers, head.weight"], BEFORE, ""),
        (["logits of 5"], {}, ""),
    ],
)
def test_why_a_mutant_survives(changed, now, why):
    told = run.why_it_survives(changed, BEFORE if now else {}, now)
    assert told.startswith(why) and bool(told) == bool(why)


def test_survivors_are_grouped_by_reason():
    one, two, three = ({"result": "survives", "mutant": f"line {n}", "changed": ["text"]} for n in (1, 2, 3))
    said = run.report([dict(one, why="a default"), two, dict(three, why="a default")])
    lines = said.splitlines()[2:]
    assert [line[:40] for line in lines[:2]] == ["survivors, reason unknown:", "  line 2 (changes text)"]
    assert lines[2:] == ["survivors, a default:", "  line 1 (changes text)", "  line 3 (changes text)"]


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["not_there.py:GPT"])
    assert "not_there.py" in capsys.readouterr().err


def test_a_process_that_hangs_or_dies_is_a_result():
    import os
    import time

    assert run.bounded(lambda: time.sleep(60) or {}, seconds=0.3) == {"result": "too slow"}
    assert run.bounded(lambda: os._exit(3), seconds=20)["result"] == "crashes"
    assert "boom" in run.bounded(lambda: {}["boom"], seconds=20)["says"]
