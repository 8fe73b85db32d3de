"""What one run comes to, by whatever door: green or why not, what is skipped, where to start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformer_checks.checks.expect import fail, needs
from transformer_checks.checks.reference import reference
from transformer_checks.checks.run import NOTHING_TO_LEARN
from transformer_checks.checks.run.expected_failures import Expected
from transformer_checks.checks.run.order import Check, Listed, all_listed
from transformer_checks.checks.run.processes import Shared
from transformer_checks.checks.run.session import NOTHING_RAN, Session


def record(check: str, outcome: str, says: str = "") -> dict[str, Any]:
    return {"check": check, "outcome": outcome, "says": says, "where": None, "remarks": [], "theme": "", "evidence": {}}


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


def whole_run(executed: int, says: str = "there is none") -> Session:
    """Over all checks: the first `executed` passed, the others were not applicable."""
    known = list(all_listed())
    return session(
        *(record(c, "passed") if i < executed else record(c, "not_applicable", says) for i, c in enumerate(known))
    )


def test_a_run_in_which_hardly_a_check_applied_is_not_green():
    few = int(0.24 * len(all_listed()))
    assert not whole_run(few).green and f"only {few} of" in whole_run(few).complaints[0]
    assert whole_run(int(0.26 * len(all_listed()))).green
    assert whole_run(few, NOTHING_TO_LEARN).green, "a model without parameters has fewer checks"
    assert session(*whole_run(few).records[1:]).green, "a part of the checks was asked for"


def test_green_sanity_says_what_it_does_not_show():
    def sanity(outcome: str) -> list[str]:
        return session(record("a", outcome) | {"theme": "sanity"}).ending()

    assert "a model without a causal mask learns the sentence as well" in sanity("passed")[-1]
    assert sanity("passed")[-1].endswith("pytest --model model.py")
    assert not any("as well" in line for line in (*sanity("failed"), *session(record("a", "passed")).ending()))


@dataclass(frozen=True)
class Here(Listed):
    """A check that this file defines."""

    function: Check | None = None

    def load(self) -> Check:
        assert self.function is not None
        return self.function


def here(function: Any, **how: Any) -> Here:
    function.__module__ = "check_here"
    return Here("here", function.__name__, 1, "A rule.", function=function, **how)


@here
def check_first(subject):
    """A rule."""
    fail("broken", advice="mend it")


@here
@needs("check_here.check_first")
def check_second(subject):
    """A rule."""


@here
def check_apart(subject):
    """A rule."""


def test_what_is_judged_is_written_with_its_start_before_it():
    written: list[Any] = []
    verdict = Session("model.py", write=written.append).judge(check_first, reference())
    assert verdict.outcome == "failed"
    assert [next(iter(line)) for line in written] == ["started", "subject"]
    assert written[1]["says"] == "broken" and written[1]["rule"] == "A rule."


def test_a_slow_check_is_skipped_and_says_how_to_run_it():
    check = here(lambda subject: None, slow="two new processes")
    verdict = Session("model.py").judge(check, reference())
    assert verdict.outcome == "skipped"
    assert all(words in verdict.says for words in ("two new processes", "--slow", "slow=True"))
    assert Session("model.py", slow=True).judge(check, reference()).outcome == "passed"


# -- what a check needs


def test_what_a_check_needs_is_judged_before_it_in_whatever_order_they_run():
    """As with --ff, or where another process has the first."""
    written: list[Any] = []
    run = Session("model.py", write=written.append)
    run.choose([check_first, check_second])
    verdicts = [run.judge(check, reference()) for check in (check_second, check_first)]
    assert [verdict.outcome for verdict in verdicts] == ["blocked", "failed"]
    assert [line["started"] for line in written if "started" in line] == [
        "check_here.check_first",
        "check_here.check_second",
    ]
    assert [line["check"] for line in written if "check" in line] == [
        "check_here.check_second",
        "check_here.check_first",
    ]


def test_what_a_check_needs_blocks_nothing_where_it_is_not_chosen():
    run = Session("model.py")
    run.choose([check_second])
    assert run.judge(check_second, reference()).outcome == "passed"


def test_processes_read_the_verdicts_of_each_other(tmp_path):
    one, two = (Session("model.py", shared=Shared(tmp_path / "0")) for _ in range(2))
    ran: list[str] = []

    @here
    def check_first(subject):
        """A rule."""
        ran.append("first")
        fail("broken", advice="mend it", numbers=(1, 2))

    for run in (one, two):
        run.choose([check_first, check_second])
    first = one.judge(check_first, reference())
    assert two.judge(check_second, reference()).outcome == "blocked"
    assert two.judge(check_first, reference()) == first and ran == ["first"]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "0").write_text("in the way")
    run = Session("model.py", shared=Shared(tmp_path / "0"))
    run.choose([check_first, check_second])
    assert run.judge(check_second, reference()).outcome == "blocked"


# -- a budget


def test_a_budget_stops_before_the_first_check_that_does_not_fit():
    run = Session("model.py", budget=0.0)
    run.add(run.judge(check_apart, reference()).as_dict())
    (verdict,) = run.verdicts.values()
    assert verdict.outcome == "skipped" and "budget of 0 s" in verdict.says
    assert any("left out 1 check" in line and "100 % of the known bugs" in line for line in run.ending())


def test_a_budget_that_is_not_spent_leaves_out_nothing():
    run = Session("model.py", budget=60.0)
    run.add(run.judge(check_apart, reference()).as_dict())
    assert run.verdicts["check_here.check_apart"].outcome == "passed"
    assert not any("budget" in line for line in run.ending())


def test_a_check_does_not_run_where_the_budget_left_out_what_it_needs(monkeypatch):
    run = Session("model.py", budget=60.0)
    run.choose([check_first, check_second])
    asked: list[str] = []

    def allows(check):
        asked.append(check.name)
        return asked == ["check_second"]

    monkeypatch.setattr(run.budget, "allows", allows)
    assert run.judge(check_second, reference()).outcome == "skipped"


# -- the order of a report


def test_the_records_are_in_the_order_of_the_themes():
    last, first = "check_sanity.check_memorizes_the_sentence", "check_contract.check_logits_have_shape"
    run = session(record(last, "failed"), record(first, "failed"), record("check_of.nobody", "failed"))
    assert [r["check"] for r in run.records] == [first, last, "check_of.nobody"]
    assert run.start() == f"start with {first}"
