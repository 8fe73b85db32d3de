"""What a short run need not import, and what is not done to the modules that it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECORDER = """
import json, sys
def pytest_unconfigure():
    with open("modules.json", "w") as file:
        loaders = {name: getattr(module, "__loader__", None) for name, module in sys.modules.items()}
        json.dump({name: type(loader).__name__ for name, loader in loaders.items()}, file)
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "recorder.py").write_text(RECORDER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "-p", "no:cacheprovider", *arguments]
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def modules_after(folder: Path) -> dict[str, str]:
    """The modules that were there when pytest ended, with the type of their loader."""
    return json.loads((folder / "modules.json").read_text())


@pytest.fixture(scope="module")
def sanity(tmp_path_factory):
    """The folder of a run of the sanity checks."""
    folder = tmp_path_factory.mktemp("sanity")
    done = run_pytest(folder, "--model", "transformer", "-m", "sanity")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("unneeded", ["torch._dynamo", "sympy", "hypothesis", "matplotlib.pyplot"])
def test_the_sanity_checks_import_no_library_that_they_do_not_need(sanity, unneeded):
    assert (sanity / "out" / "sanity_check_1" / "loss.png").exists()
    assert "matplotlib.figure" in modules_after(sanity)
    assert unneeded not in modules_after(sanity)


def test_the_sanity_checks_import_no_other_check(sanity):
    checks = {name.rpartition(".")[2] for name in modules_after(sanity) if ".checks.check_" in name}
    assert checks == {"check_sanity"}


def test_pytest_rewrites_no_module_of_ours(sanity):
    ours = {name: loader for name, loader in modules_after(sanity).items() if name.startswith("transformer_checks.")}
    ours.pop("transformer_checks.as_written")  # which has this done for all that come after it
    assert len(ours) > 50 and set(ours.values()) == {"SourceFileLoader"}


def test_hypothesis_reports_on_the_tests_of_others(tmp_path):
    (tmp_path / "test_theirs.py").write_text(
        "from hypothesis import given, strategies\n\n@given(strategies.integers())\ndef test_x(n):\n    assert n == n\n"
    )
    done = run_pytest(tmp_path, "--hypothesis-show-statistics", "test_theirs.py")
    assert "Hypothesis Statistics" in done.stdout and "test_theirs.py::test_x" in done.stdout


def test_a_run_without_the_plugin_of_hypothesis_ends_well(tmp_path):
    done = run_pytest(tmp_path, "--model", "transformer", "-m", "sanity", "--collect-only", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr


IMPORTS = """
import gc, sys
from transformer_checks.checks.run.libraries import import_for_good
collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"]))
gc.collect()
collections.clear()
assert import_for_good("email.message", "xml.dom.minidom")
assert "xml.dom.minidom" in sys.modules and not collections, collections
assert gc.isenabled() and gc.get_freeze_count() == 0
old = {id(thing) for thing in gc.get_objects(generation=2)}
assert id(sys.modules["xml.dom.minidom"].__dict__) in old
assert not import_for_good("email.message"), "imported already"
try:
    import_for_good("there.is.none")
except ImportError:
    assert gc.isenabled()
else:
    raise AssertionError("no error")
gc.disable()
gc.freeze()
assert import_for_good("sqlite3")
assert not gc.isenabled(), "whoever switched it off keeps it off"
assert gc.get_freeze_count() > 0, "what others froze stays so"
"""


def test_no_garbage_is_collected_while_a_library_is_imported():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
