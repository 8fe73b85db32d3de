"""Running one check: every way it can end becomes a verdict, none an exception."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from transformer_checks.checks.expect import NotApplicable, Where, advise, fail, keep, needs, note
from transformer_checks.checks.reference import reference
from transformer_checks.checks.report import lines, terminal
from transformer_checks.checks.run.diagnosis import where_to_start
from transformer_checks.checks.run.verdict import Verdict, judge


def run(check, earlier=None):
    return judge(check, reference(), earlier or {})


def test_a_check_that_returns_has_passed_with_its_remarks():
    def check_it(subject):
        """What must hold.

        More."""
        note(margin=0.1)
        advise("unusual")
        keep(model=object())

    verdict = run(check_it)
    assert (verdict.outcome, verdict.rule, verdict.evidence, verdict.remarks) == (
        "passed", "What must hold.", {"margin": 0.1}, ["unusual"],
    )  # fmt: skip
    assert verdict.as_dict()["kept"] == {}


def test_a_failure_carries_its_finding():
    def check_it(subject):
        note(tried=3)
        fail("broken at 2", likely=("no-causal-mask",), advice="look", where=Where("blocks.0"), position=2)

    verdict = run(check_it)
    assert (verdict.outcome, verdict.says, verdict.likely, verdict.advice) == (
        "failed", "broken at 2", ("no-causal-mask",), "look",
    )  # fmt: skip
    assert verdict.evidence == {"tried": 3, "position": 2}


def test_not_applicable_keeps_its_reason_and_evidence():
    def check_it(subject):
        raise NotApplicable("it has no cache", signature="(tokens)")

    verdict = run(check_it)
    assert (verdict.outcome, verdict.says, verdict.evidence) == (
        "not_applicable", "it has no cache", {"signature": "(tokens)"},
    )  # fmt: skip


def test_a_crash_is_an_error_and_never_an_exception():
    verdict = run(lambda subject: torch.zeros(2) @ torch.zeros(3))
    assert verdict.outcome == "error"
    assert verdict.says.startswith("RuntimeError")


def test_what_is_about_gradients_does_not_apply_to_a_model_without_parameters():
    """A model in NumPy: nothing is wrong with it, and nothing of it can be differentiated."""
    subject = reference()
    subject.parts.build_model = lambda **sizes: torch.nn.Identity()

    def check_it(subject):
        torch.zeros(2).sum().backward()

    def check_something_else(subject):
        raise RuntimeError("of its own")

    verdict = judge(check_it, subject, {})
    assert (verdict.outcome, "no trainable parameters" in verdict.says) == ("not_applicable", True)
    assert run(check_it).outcome == "error"
    assert judge(check_something_else, subject, {}).outcome == "error"


def test_what_torch_cannot_do_on_the_cpu_is_no_mistake_of_the_model():
    def check_it(subject):
        """Rule."""
        flex_attention(*torch.ones(3, 1, 1, 16, 16, requires_grad=True))

    verdict = run(check_it)
    assert verdict.outcome == "not_applicable" and "backward on CPU" in verdict.says


def test_ctrl_c_passes_through():
    def check_it(subject):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(check_it)


@pytest.mark.parametrize("outcome", ["failed", "error", "blocked"])
def test_a_check_is_blocked_by_what_it_needs(outcome):
    ran = []

    @needs("check_contract.check_first")
    def check_it(subject):
        ran.append(1)

    first = Verdict("check_contract.check_first", "contract", outcome, "")
    verdict = run(check_it, {first.check: first})
    assert verdict.outcome == "blocked"
    assert first.check in verdict.says
    assert not ran


@pytest.mark.parametrize("outcome", ["passed", "not_applicable", "skipped"])
def test_what_did_not_fail_blocks_nothing(outcome):
    @needs("check_contract.check_first")
    def check_it(subject):
        pass

    assert run(check_it, {"check_contract.check_first": Verdict("", "", outcome, "")}).outcome == "passed"


def test_a_line_is_strict_json_whatever_the_evidence():
    record = {"nan": float("nan"), "inf": [float("-inf")], "tensor": torch.ones(2), 3: {1, 2}, "tuple": (1, None)}
    read = json.loads(lines.line(record))
    assert read["nan"] == "nan"
    assert read["inf"] == ["-inf"]
    assert read["tuple"] == [1, None]
    assert sorted(read["3"]) == [1, 2]


def test_the_summary_counts_what_ran_and_what_applied():
    outcomes = ["passed", "passed", "failed", "not_applicable", "blocked", "error"]
    records = [{"check": f"check_{i}", "outcome": o, "says": "", "evidence": {}} for i, o in enumerate(outcomes)]
    summary = lines.summary("model.py", records, total=7)["summary"]
    assert (summary["executed"], summary["applicable"], summary["total"]) == (4, 5, 7)
    assert (summary["passed"], summary["failed"], summary["blocked"]) == (2, 1, 1)
    assert terminal.totals(summary) == ("2 passed, 1 failed, 1 crashed, 1 not applicable, 1 blocked; 4 of 7 checks ran")


def test_the_summary_says_why_nothing_was_seen_most_first():
    def record(check, outcome, says="", **evidence):
        return {"check": check, "outcome": outcome, "says": says, "evidence": evidence}

    records = [
        record("a", "failed", "it leaks"),
        record("b", "blocked", "needs a, which failed"),
        record("c", "blocked", "needs b, which blocked"),
        record("d", "not_applicable", "no loss was found", unless="--with loss=FILE.py:NAME"),
        *(record(f"e{i}", "not_applicable", "no cache was found") for i in range(3)),
        record("f", "passed"),
    ]
    reasons = lines.summary("model.py", records, total=9)["summary"]["not_looked_at"]
    assert list(reasons.items()) == [
        ("no cache was found", 3),
        ("they wait for a, which did not pass", 2),
        ("no loss was found (--with loss=FILE.py:NAME would change that)", 1),
    ]
    assert terminal.not_looked_at(reasons)[:2] == ["not looked at, by 6 checks:", "    3  no cache was found"]
    many = terminal.not_looked_at({f"reason {i}": 2 for i in range(terminal.REASONS + 3)})
    assert len(many) == terminal.REASONS + 2 and many[-1] == "    6  3 other reasons, each in its verdict (-v)"
    assert terminal.not_looked_at({}) == []


def test_a_failure_as_text_answers_the_five_questions():
    verdict = Verdict(
        "check_causality.check_x", "causality", "failed", "No token changes an earlier logit.", "position 2 changed",
        where=Where("blocks.0.attention", "Attention", "/elsewhere/model.py", 29), likely=("no-causal-mask",),
        advice="apply the mask", example={"t": 2}, reproduce="pytest --model model.py --seed 1 -k check_x",
    )  # fmt: skip
    text = terminal.failure(verdict.as_dict(), {"no-causal-mask": "no-causal-mask: sees the future"}.get)
    for fact in (
        "check_causality.check_x", "position 2 changed", "t = 2",
        "blocks.0.attention (Attention, /elsewhere/model.py:29)",
        "sees the future", "Apply the mask.", "pytest --model model.py --seed 1 -k check_x",
    ):  # fmt: skip
        assert fact in text


def test_where_to_start_is_the_crash_else_the_first_failure():
    def v(check, outcome):
        return Verdict(check, "", outcome, "").as_dict()

    assert where_to_start([v("a", "passed")]) == ""
    assert "b" in where_to_start([v("a", "passed"), v("b", "failed"), v("c", "failed")])
    assert where_to_start([v("b", "failed"), v("c", "error")]) == "start with c"


def test_on_the_meta_device_no_failure_is_stated():
    """There are no numbers there: whatever a check makes of them is no verdict."""

    def check_it(subject):
        fail("the logits differ", advice="look")

    verdict = judge(check_it, reference(device="meta"), {})
    assert verdict.outcome == "not_applicable" and "meta" in verdict.says and "the logits differ" in verdict.says


def test_what_was_drawn_together_is_shown_by_its_own_names():
    verdict = Verdict(
        "check_x", "", "failed", "", advice="`mask` is missing", example={"case": {"length": 1, "seed": 0}}
    )
    text = terminal.failure({**verdict.as_dict(), "reproduce": "pytest"})
    assert "length = 1, seed = 0" in text and "{" not in text
    assert "`mask` is missing." in text
