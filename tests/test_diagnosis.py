"""What the likely causes of a finding are called."""

from __future__ import annotations

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.diagnosis import explain


def test_what_a_bug_is_is_read_from_its_text_as_it_is_imported():
    assert all_bugs()
    for bug in all_bugs().values():
        assert explain(bug.id) == f"{bug.id}: {bug.says}"
    assert explain("bug-of-nobody") == "bug-of-nobody"
