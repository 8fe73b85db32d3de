"""The layout rules: imports point one way and in no circle, names say something, a stranger pays for nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("transformer", "checks", "power", "benchmarks", "tests")
PARTS = ("data", "loss", "generation", "trainer", "checkpoint")  # of the reference, for a subject without its own
LAWS = ("checks.expect", "checks.subject", "checks.probes", "checks.watch", "checks.ways", "checks.loss",
        "checks.generation", "checks.training", *(f"transformer.{part}" for part in PARTS))  # fmt: skip
# What a file of ours may import of ours, by the longest prefix that fits.
ALLOWED = {
    "transformer": ("transformer",),
    "checks.report": ("checks.report",),
    "checks.expect": ("checks.report",),
    "checks.check_": LAWS,
    "checks.check_spec": (*LAWS, "checks.family"),
    "checks.watch": ("checks.expect", "checks.subject", "checks.watch"),
    "checks": ("checks", "transformer"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


MODULES = {module_name(path): path for path in sources("transformer", "checks")}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it and under TYPE_CHECKING too."""
    name = module_name(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES}


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def allowed(name: str) -> tuple[str, ...]:
    return ALLOWED[max((prefix for prefix in ALLOWED if name.startswith(prefix)), key=len)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    wrong = {i for i in IMPORTS[name] if not any(i == a or i.startswith(a + ".") for a in allowed(name))}
    assert not wrong, f"{name} must not import {wrong}"


def circle_through(name: str) -> list[str]:
    """The modules on a way of imports from this one back to it; none where there is no such way."""
    ways = {module: [name, module] for module in IMPORTS[name]}
    for module in (queue := list(ways)):
        if module == name:
            return ways[module]
        for further in IMPORTS[module] - set(ways):
            ways[further] = [*ways[module], further]
            queue.append(further)
    return []


@pytest.mark.parametrize("name", MODULES)
def test_no_import_circle(name):
    assert not circle_through(name)


def test_no_law_imports_a_law_or_the_reference_model():
    """The reference enters a check by the same door as a student's file."""
    for name, imported in IMPORTS.items():
        if name.startswith("checks.check_"):
            assert not [module for module in imported if module.startswith("checks.check_")], name
            assert "transformer.model" not in imported, name


def test_no_room_is_named_for_nothing():
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
    assert not [path for path in sources(*PACKAGES) if path.stem in empty]


def test_no_module_of_ours_is_loaded_twice():
    """Under one name each, whoever loaded it: pytest, the plugin, this file."""
    names: dict[str, set[str]] = {}
    ours = {*sources("transformer", "checks"), *(ROOT / "src").rglob("*.py")}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file) in ours:
            names.setdefault(file, set()).add(name)
    assert not {file: known for file, known in names.items() if len(known) > 1}
    assert not {"checks", "transformer"} & set(sys.modules)


def in_a_process(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_the_plugin_costs_a_stranger_nothing():
    """Importing the plugin, as every pytest run does once it is installed, brings in neither torch nor hypothesis."""
    heavy = "{'torch', 'hypothesis', 'numpy', 'matplotlib', 'rich'}"
    code = f"import sys, transformer_checks.checks.plugin; print(sorted({heavy} & set(sys.modules)))"
    assert in_a_process(code) == "[]"


def test_the_reference_is_loaded_without_the_loader_of_foreign_code():
    heavy = "{'transformer_checks.checks.meet.load', 'hypothesis', 'matplotlib', 'torch._dynamo', 'sympy', 'rich'}"
    code = (
        "import sys; from transformer_checks.checks.run.subjects import subject_of; subject_of().build(); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert in_a_process(code) == "[]"
