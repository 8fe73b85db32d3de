"""The order in which checks run, the data that it comes from, and how far a budget goes."""

from __future__ import annotations

import json

import pytest

from power import strength as measured
from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run import strength
from transformer_checks.checks.run.order import Listed, all_listed, check_id
from transformer_checks.checks.run.strength import FILE, Budget, Strength, caught_by_none_of, in_order, strengths

AGAIN = "run `python -m power.strength`"


def needed(check) -> tuple[str, ...]:
    return getattr(check, "needs", ())


# -- the data


def test_a_check_runs_after_those_that_it_needs():
    order = [check.id for check in in_order(all_listed().values())]
    assert sorted(order) == sorted(all_listed())
    late = [(check_id(check), need) for check in all_checks() for need in needed(check)
            if order.index(need) > order.index(check_id(check))]  # fmt: skip
    assert not late, AGAIN


def test_the_data_is_about_the_checks_and_bugs_that_there_are():
    assert not set(strengths()) - set(all_listed()), AGAIN
    bugs = json.loads(FILE.read_text(encoding="utf-8"))["bugs"]
    assert not set(bugs) - set(all_bugs()), AGAIN
    assert max(max(found.catches, default=0) for found in strengths().values()) < len(bugs)
    unknown = [check for check in all_listed().values() if check.id not in strengths() and not check.slow]
    assert len(unknown) < 10, f"{len(unknown)} checks are in no order: {AGAIN}"


def test_the_order_is_that_of_its_numbers():
    assert measured.in_order(strengths(), measured.needs()) == list(strengths()), AGAIN


def test_an_early_check_catches_more_per_second_than_a_late_one():
    found = list(strengths().values())
    half = sum(one.seconds for one in found) / 2
    early = late = frozenset[int]()
    spent = 0.0
    for one in found:
        spent += one.seconds
        early, late = (early | one.catches, late) if spent < half else (early, late | one.catches)
    assert len(early) > 3 * len(late - early)


# -- the greedy order


def orders(checks: dict[str, tuple[float, set[int]]], **needs: tuple[str, ...]) -> str:
    every = {name: Strength(seconds, frozenset(bugs)) for name, (seconds, bugs) in checks.items()}
    return "".join(measured.in_order(every, {name: needs.get(name, ()) for name in checks}))


def test_what_catches_most_per_second_is_first():
    assert orders({"a": (1.0, {1, 2}), "b": (0.1, {3}), "c": (0.2, {4, 5, 6})}) == "cba"


def test_what_is_caught_already_counts_no_more():
    assert orders({"a": (1.0, {1, 2, 3}), "b": (1.0, {1, 2}), "c": (1.0, {4})}) == "acb"


def test_what_a_check_needs_is_part_of_its_price():
    checks = {"a": (0.1, {1, 2}), "b": (1.0, set()), "c": (0.1, {3})}
    assert orders(checks) == "acb"
    assert orders(checks, a=("b",)) == "cba"


def test_a_check_of_which_nothing_was_measured_comes_where_another_needs_it():
    order = measured.in_order({"a": Strength(0.1, frozenset({1}))}, {"a": ("new",), "new": ()})
    assert order == ["new", "a"]


# -- from tables to numbers


def test_only_a_failure_is_a_catch_and_the_median_counts(tmp_path):
    table = tmp_path / "table.jsonl"
    verdicts = [("passed", 1.0), ("failed", 2.0), ("error", 9.0), ("blocked", 0.0)]
    lines = [
        {"subject": f"bug:{number}", "check": "check_a.check_x", "outcome": outcome, "seconds": seconds}
        for number, (outcome, seconds) in enumerate(verdicts)
    ]
    other = {"check": "check_a.check_y", "outcome": "failed", "seconds": 3}
    rows = [{"kind": "bug", "subject": "4", "verdicts": [other]}, {"kind": "control", "subject": "5", "verdicts": []}]
    table.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *rows)))
    bugs, catches, seconds = measured.measured(measured.rows(table))
    assert bugs == ["0", "1", "2", "3", "4"]
    assert catches == {"check_a.check_x": {1}, "check_a.check_y": {4}}
    assert seconds == {"check_a.check_x": 2.0, "check_a.check_y": 3}


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    first, second = list(all_listed())[:2]
    numbers = {second: Strength(0.25, frozenset({0, 1})), first: Strength(0.5, frozenset({1}))}
    measured.write(["one", "two"], numbers, tmp_path / "strength.json")
    monkeypatch.setattr(strength, "FILE", tmp_path / "strength.json")
    assert strengths.__wrapped__() == numbers


# -- a budget


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(strength, "processor_seconds", clock := Clock())
    known = {f"check_x.check_{name}": Strength(1.0, frozenset({number})) for number, name in enumerate("abcdef")}
    monkeypatch.setattr(strength, "strengths", lambda: known)
    return clock


def check(name: str) -> Listed:
    return Listed("x", f"check_{name}", 1, "A rule.")


def runs(budget: Budget, clock: Clock, seconds: float) -> str:
    """The checks that run where each takes this long."""
    ran = ""
    for name in "abcdef":
        if budget.allows(check(name)):
            clock.now += seconds
            budget.took(check(name), seconds)
            ran += name
    return ran


@pytest.mark.parametrize(("seconds", "ran"), [(1.0, "abc"), (0.5, "abcdef"), (2.0, "a")])
def test_a_budget_ends_before_the_check_that_would_overdraw_it(clock, seconds, ran):
    """A model on which checks take twice as long is expected to go on like that."""
    assert runs(Budget(3.6), clock, seconds) == ran


def test_after_the_first_check_that_does_not_fit_none_does(clock):
    budget = Budget(1.5)
    assert budget.allows(check("a"))
    clock.now = 1.0
    assert not budget.allows(check("b"))
    clock.now = 0.0
    assert not budget.allows(check("unknown"))


def test_what_is_imported_before_the_first_check_is_not_charged(clock):
    clock.now = 100.0
    assert Budget(1.5).allows(check("a"))


def test_only_what_no_other_check_catches_is_missed(clock, monkeypatch):
    known = {
        "a": Strength(1.0, frozenset({1, 2})),
        "b": Strength(1.0, frozenset({2, 3})),
        "c": Strength(1.0, frozenset()),
    }
    monkeypatch.setattr(strength, "strengths", lambda: known)
    assert caught_by_none_of(["a", "c"]) == (1, 3)
    assert caught_by_none_of(["a", "b", "new"]) == (0, 3)
    assert caught_by_none_of([]) == (3, 3)
