"""The layout rules: imports point one way, names say something, nothing is imported that a stranger would pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("transformer", "checks", "tests", "benchmarks")
# What a file of ours may import of ours, by the longest prefix that fits; "" is nothing.
ALLOWED = {
    "transformer": ("transformer",),
    "checks.report": ("checks.report",),
    "checks.expect": (),
    "checks.expected": ("checks",),
    "checks.where": ("checks.expect",),
    "checks.check_": ("checks", "transformer.data", "transformer.loss", "transformer.generation", "transformer.trainer",
                      "transformer.checkpoint"),
    "checks.check_spec": ("checks", "transformer"),
    "checks.spec": ("checks", "transformer"),
    "checks.bugs": ("checks", "transformer"),
    "checks": ("checks", "transformer"),
}  # fmt: skip


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in PACKAGES}


def allowed(name: str) -> tuple[str, ...]:
    return ALLOWED[max((prefix for prefix in ALLOWED if name.startswith(prefix)), key=len)]


@pytest.mark.parametrize("path", [*sources("transformer"), *sources("checks")], ids=module_name)
def test_imports_point_one_way(path):
    name = module_name(path)
    wrong = {i for i in imports(path) if not any(i == a or i.startswith(a + ".") for a in allowed(name))}
    assert not wrong, f"{name} must not import {wrong}"


def test_a_rule_covers_the_reference_model_in_checks():
    """The reference enters a check by the same door as a student's file, or not at all."""
    for path in sources("checks"):
        name = module_name(path)
        if name.startswith("checks.check_") and not name.startswith("checks.check_spec"):
            assert "transformer.model" not in imports(path), name


def test_no_room_is_named_for_nothing():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert not [p for package in PACKAGES for p in sources(package) if p.stem in empty]


def test_files_stay_readable():
    """Readers get lost in files over 600 lines."""
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sources(package)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def test_the_plugin_costs_a_stranger_nothing():
    """Importing the plugin, as every pytest run does once it is installed, brings in neither torch nor hypothesis."""
    code = (
        "import sys, checks.plugin; "
        "print(sorted({'torch', 'hypothesis', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reference_is_met_without_what_meets_foreign_code():
    code = (
        "import sys; from checks.subject import Subject; Subject.meet().build(); "
        "print(sorted({'checks.conventions.meeting', 'hypothesis', 'matplotlib', 'torch._dynamo', 'sympy', 'rich'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
