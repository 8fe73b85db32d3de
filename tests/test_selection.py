"""What selects among checks selects what it says: node ids, -k, --lf, --ff, --sw, from any folder and for any name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  # cannot be imported twice, and each run here forgets what it imported

import transformer_checks.checks.subject  # noqa: F401  # imported once for all runs here
from transformer_checks.checks.run.order import CHECKS, all_listed, listed

pytest_plugins = ("pytester",)

BAG = """
from torch import nn


class Bag(nn.Module):
    '''Every position hears the mean of all.'''

    def __init__(self, vocab_size, width=8):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + x.mean(dim=1, keepdim=True))
"""
LEAK = "check_future_cannot_change_past"
FEW = "check_logits or check_inputs_are_left_alone or check_eval_repeats_itself or " + LEAK
NAMES = ["model.py", "cache/masking [old] loss.py", "a folder/model [1].py:Bag"]


class Project:
    """A folder with a model, in which `pytest` runs as a user would run it."""

    def __init__(self, pytester: pytest.Pytester, model: str) -> None:
        self.pytester, self.model = pytester, model
        file = pytester.path / model.partition(":")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(BAG)
        pytester.makeini("[pytest]\n")

    def pytest(self, *options: str) -> list[str]:
        # Unless told otherwise, pytest takes the folder of a file that it is given for the root of the project.
        root = () if "--rootdir" in options else ("--rootdir", str(self.pytester.path))
        return self.pytester.runpytest_inprocess("--model", self.model, "--seed", "3", *root, *options).outlines

    def selected(self, *options: str) -> list[str]:
        """The names of the checks that would run, without the model."""
        return [names(id)[1] for id in self.ids(*options)]

    def ids(self, *options: str) -> list[str]:
        return [line for line in self.pytest("--collect-only", "-q", *options) if "::" in line]


def names(id: str) -> tuple[str, str]:
    """`check_cache` and `check_x` of a node id."""
    file, _, name = id.partition("::")
    return Path(file).stem, name.partition("[")[0]


@pytest.fixture(params=NAMES)
def project(request, pytester):
    return Project(pytester, request.param)


@pytest.fixture
def one(pytester):
    return Project(pytester, NAMES[1])


def test_a_node_id_that_was_printed_selects_its_check(project):
    (printed,) = project.ids("-k", "check_logits_have_shape")
    assert project.model in printed
    assert project.ids(printed) == [printed]
    assert project.ids(printed.replace(project.model, "other.py")) == []


def test_a_node_id_selects_its_check_from_another_folder(one, monkeypatch):
    """Wherever the checks lie: beside the root of the project, or in an environment inside it."""
    one.model = str(one.pytester.path / one.model)
    for root in (str(one.pytester.path), str(CHECKS.parent.parent)):
        (printed,) = one.ids("-k", "check_logits_have_shape", "--rootdir", root)
        elsewhere = one.pytester.mkdir(f"elsewhere-{len(root)}")
        with monkeypatch.context() as there:
            there.chdir(elsewhere)
            assert one.ids(printed, "--rootdir", root) == [printed]


def test_what_a_summary_prints_selects_its_check_again(one):
    said = one.pytest("-k", FEW, "-q")
    failed = [line.removeprefix("FAILED ").partition(" - ")[0] for line in said if line.startswith("FAILED ")]
    assert LEAK in [names(id)[1] for id in failed], said
    assert [one.ids(id) for id in failed] == [[id] for id in failed]


def test_last_failed_and_failed_first_and_stepwise(one):
    said = one.pytest("-k", FEW, "-q")
    failed = [names(line)[1] for line in said if line.startswith("FAILED ")]
    every = one.selected("-k", FEW)
    assert LEAK in failed and len(failed) < len(every)
    assert sorted(one.selected("-k", FEW, "--lf")) == sorted(failed)
    first = one.selected("-k", FEW, "--ff")
    assert sorted(first[: len(failed)]) == sorted(failed) and sorted(first) == sorted(every)
    one.pytest("-k", FEW, "--sw")
    again = one.selected("-k", FEW, "--sw")
    assert again == every[every.index(again[0]) :] and again[0] in failed


def test_words_select_by_the_name_of_a_check_or_its_theme(project):
    cache = [check for check in all_listed().values() if "cache" in check.id]
    assert sorted(project.selected("-k", "cache")) == sorted(check.name for check in cache)
    assert set(project.selected("-k", "not cache")) == {c.name for c in all_listed().values() if "cache" not in c.id}
    folder = CHECKS.parent.name  # of the checkout: selects only what happens to be called so
    so_called = {check.name for check in all_listed().values() if folder.lower() in check.id}
    assert set(project.selected("-k", f"{folder} or transformer_checks")) == so_called
    (one, *_) = listed("masking")
    assert project.selected("-k", f"check_masking and {one.name}") == [one.name]


def test_a_word_of_the_command_that_a_finding_prints_selects_its_check(one):
    said = one.pytest("-k", FEW)
    again = next(line for line in said if line.startswith("  again") and f"{LEAK}'" in line)
    assert one.selected("-k", again.split("-k ")[1].strip("'")).count(LEAK) == 1


def test_a_file_of_checks_is_selected_by_its_path(one):
    assert sorted(one.selected(str(CHECKS / "check_cache.py"))) == sorted(check.name for check in listed("cache"))


def test_collecting_imports_no_check(one):
    (one.pytester.path / "seen.py").write_text(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    print('imported:', [n for n in sys.modules if '.checks.check_' in n], 'hypothesis' in sys.modules)\n"
    )
    seen = ("-q", "-p", "seen", "-p", "no:hypothesispytest")
    command = [sys.executable, "-m", "pytest", "--model", one.model, "--collect-only", *seen]
    done = subprocess.run(command, cwd=one.pytester.path, capture_output=True, text=True)
    assert len([line for line in done.stdout.splitlines() if "::" in line]) == len(all_listed())
    assert "imported: [] False" in done.stdout
    command = [*command[:5], "-m", "sanity", *seen]
    done = subprocess.run(command, cwd=one.pytester.path, capture_output=True, text=True)
    assert ".checks.check_sanity'] False" in done.stdout, done.stdout
