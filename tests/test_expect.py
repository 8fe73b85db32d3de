"""Comparisons that explain themselves, and the search for a smallest failing case."""

from __future__ import annotations

import inspect
import time
import unittest

import pytest
import torch
from hypothesis import strategies as st

from transformer_checks.checks.expect import (
    Bound,
    CheckFailed,
    NotApplicable,
    advise,
    drawn,
    expect_close,
    expect_differs,
    expect_same,
    farthest,
    first_offence,
    note,
    remarks,
)
from transformer_checks.checks.reference import reference


def finding(call):
    with pytest.raises(CheckFailed) as caught:
        call()
    return caught.value.finding


def test_a_difference_is_named_by_its_first_position_its_size_and_its_bound():
    got, want = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    got[1, 0, 2], got[1, 2, 3] = 0.25, 0.5
    found = finding(lambda: expect_close(got, want, bound=Bound(1e-3, "a reason"), says="they differ", advice=""))
    assert found.evidence["first"] == {"row": 1, "position": 0, "symbol": 2}
    assert found.evidence["difference"] == 0.5
    for fact in ("they differ", "row 1, position 0, logit 2", "0.25", "0.5", "a reason"):
        assert fact in found.says


def test_within_the_bound_is_silent_and_returns_the_margin():
    assert expect_close(torch.tensor([1.0]), torch.tensor([1.5]), bound=Bound(0.5, "x"), says="", advice="") == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_on_one_side_is_infinitely_far(bad):
    got, want = torch.tensor([[[bad]]]), torch.tensor([[[1.0]]])
    assert farthest(got, want) == float("inf")
    assert first_offence(got, want, 1e9) == (0, 0, 0)
    assert farthest(got, got) == 0.0


def test_exact_equality_sees_the_last_bit():
    want = torch.ones(1, 1, 1)
    got = torch.nextafter(want, torch.full_like(want, 2))
    assert "exactly 0" in finding(lambda: expect_same(got, want, says="bits", advice="")).says


def test_shapes_that_differ_fail_with_both_shapes():
    says = finding(lambda: expect_same(torch.ones(2), torch.ones(3), says="shape", advice="")).says
    assert "(2,)" in says
    assert "(3,)" in says


def test_a_vacuous_comparison_fails_the_guard():
    same = torch.ones(3)
    found = finding(lambda: expect_differs(same, same, above=1e-6, because="noise", says="no effect", advice=""))
    assert found.evidence["difference"] == 0.0
    assert expect_differs(same, same + 1, above=1e-6, because="noise", says="", advice="") == 1.0


def test_integers_are_compared_as_integers():
    assert first_offence(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), 0.0) == (2,)


def test_remarks_are_collected_by_whoever_runs_the_check_and_lost_otherwise():
    advise("nobody listens")
    with remarks() as mine:
        advise("twice")
        advise("twice")
        note(margin=0.5)
    assert mine.advice == ["twice"]
    assert mine.evidence == {"margin": 0.5}


def test_not_applicable_is_a_skip_without_pytest():
    assert issubclass(NotApplicable, unittest.SkipTest)


def test_a_drawn_check_takes_the_subject_alone():
    @drawn(t=st.integers(0, 3))
    def check_it(subject, t):
        """Rule."""

    assert list(inspect.signature(check_it).parameters) == ["subject"]
    assert check_it.__doc__ == "Rule."


def test_the_smallest_failing_case_becomes_the_example():
    @drawn(t=st.integers(0, 100), mask=st.lists(st.booleans(), max_size=6))
    def check_it(subject, t, mask):
        if t >= 7 and any(mask):
            from transformer_checks.checks.expect import fail

            fail(f"broken at {t}", advice="mend it", at=t)

    found = finding(lambda: check_it(reference(seed=3)))
    assert found.example == {"t": 7, "mask": [True]}
    assert found.evidence == {"at": 7}


def test_a_strategy_may_depend_on_the_subject():
    seen = []

    @drawn(t=lambda subject: st.integers(1, subject.sizes.block_size))
    def check_it(subject, t):
        seen.append(t)

    check_it(reference())
    assert max(seen) <= reference().sizes.block_size
    assert len(set(seen)) > 3


def test_the_same_seed_draws_the_same_cases():
    def cases(seed):
        seen = []
        drawn(t=st.integers(0, 10**9))(lambda subject, t: seen.append(t))(reference(seed=seed))
        return seen

    assert cases(5) == cases(5) != cases(6)


def test_not_applicable_is_raised_before_the_first_draw():
    def refuse(subject):
        raise NotApplicable("no mask argument", seen="forward(tokens)")

    @drawn(when=refuse, t=st.integers())
    def check_it(subject, t):
        raise AssertionError("drawn")

    with pytest.raises(NotApplicable, match="no mask argument"):
        check_it(reference())


def test_shrinking_ends_even_where_a_case_is_slow():
    @drawn(xs=st.lists(st.integers(0, 1000), min_size=1, max_size=50))
    def check_it(subject, xs):
        from transformer_checks.checks.expect import fail

        time.sleep(0.05)
        if sum(xs) > 100:
            fail("broken", advice="mend it")

    start = time.monotonic()
    assert finding(lambda: check_it(reference())).example
    assert time.monotonic() - start < 20
