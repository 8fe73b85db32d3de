"""Which checks there are, read from their text: what is read equals what would be imported."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from transformer_checks.checks.run.order import CHECKS, PACKAGE, THEMES, all_listed, check_id, listed, position, rule


def imported(theme: str) -> list:
    module = importlib.import_module(f"{PACKAGE}.check_{theme}")
    own = (
        check for check in vars(module).values() if inspect.isfunction(check) and check.__module__ == module.__name__
    )
    return [check for check in own if check.__name__.startswith("check_")]


def test_every_file_of_checks_is_a_theme():
    assert {path.stem.removeprefix("check_") for path in CHECKS.glob("check_*.py")} == set(THEMES)


@pytest.mark.parametrize("theme", THEMES)
def test_what_is_read_is_what_is_imported(theme):
    checks = imported(theme)
    assert checks, "a theme without checks would prove nothing"
    read = [(check.id, check.rule, check.slow) for check in listed(theme)]
    assert read == [(check_id(check), rule(check), getattr(check, "slow", "")) for check in checks]
    lines = (CHECKS / f"check_{theme}.py").read_text().splitlines()
    assert all(lines[check.line - 1].startswith(f"def {check.name}(") for check in listed(theme))
    assert [check.load() for check in listed(theme)] == checks


def test_a_report_shows_checks_in_the_order_of_the_themes():
    ids = list(all_listed())
    assert sorted([ids[-1], *ids[:-1]], key=position) == ids
    assert position("check_of.nobody") == len(ids)


def test_listing_imports_no_check():
    code = (
        "import sys; from transformer_checks.checks.run.order import PACKAGE, all_listed; assert all_listed(); "
        "print([name for name in sys.modules if name.startswith(PACKAGE + '.check_')], 'hypothesis' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
