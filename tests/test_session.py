"""What one run comes to, by whatever door: green or why not, what is skipped, where to start."""

from __future__ import annotations

from typing import Any

from transformer_checks.checks.expect import fail, slow
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run.expected_failures import Expected
from transformer_checks.checks.run.session import NOTHING_RAN, Session


def record(check: str, outcome: str, says: str = "") -> dict[str, Any]:
    return {"check": check, "outcome": outcome, "says": says, "where": None, "remarks": []}


def session(*records: dict[str, Any], **how: Any) -> Session:
    made = Session("model.py", **how)
    for one in records:
        made.add(one)
    return made


def test_green_is_a_run_in_which_checks_ran_and_none_failed():
    assert session(record("a", "passed"), record("b", "not_applicable")).green
    assert not session(record("a", "passed"), record("b", "failed")).green
    assert session(record("b", "not_applicable")).complaints == [NOTHING_RAN]


def test_a_check_without_a_verdict_is_not_green():
    run = session(record("a", "passed"))
    run.waiting = {"check_x.py::check_b", "check_x.py::check_c"}
    run.add(record("c", "passed"), "check_x.py::check_c")
    (complaint,) = run.complaints
    assert not run.green and "from 1 of the checks of model.py" in complaint and "check_b" in complaint


def test_blocked_is_green_only_behind_an_expected_failure():
    blocked = record("b", "blocked", "needs a, which failed")
    assert "b needs a, which failed" in session(record("c", "passed"), blocked).complaints[0]
    expected = Expected({"a": "shared on purpose"})
    assert session(record("a", "failed"), record("c", "passed"), blocked, expected=expected).green


def test_where_to_start_is_no_expected_failure():
    run = session(record("a", "failed"), record("b", "failed"), expected=Expected({"a": "shared on purpose"}))
    assert run.start() == "b"
    assert "expected: a: shared on purpose" in run.ending()


def test_what_is_judged_is_written_with_its_start_before_it():
    written: list[Any] = []
    run = Session("model.py", write=written.append)

    def check_it(subject):
        """A rule."""
        fail("broken", advice="mend it")

    verdict = run.judge(check_it, reference())
    assert verdict.outcome == "failed"
    assert [next(iter(line)) for line in written] == ["started", "subject"]
    assert written[1]["says"] == "broken" and written[1]["rule"] == "A rule."


def test_a_slow_check_is_skipped_and_says_how_to_run_it():
    @slow("two new processes")
    def check_it(subject):
        """A rule."""

    verdict = Session("model.py").judge(check_it, reference())
    assert verdict.outcome == "skipped"
    assert all(words in verdict.says for words in ("two new processes", "--slow", "slow=True"))
    assert Session("model.py", slow=True).judge(check_it, reference()).outcome == "passed"
