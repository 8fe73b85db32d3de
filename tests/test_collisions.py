"""Names collide, both ways: theirs get theirs and ours ours, by pytest, by the command and from a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from transformer_checks.checks.meet import UsageError
from transformer_checks.checks.subject import Subject

MODEL = """
import torch
from torch import nn

import checks
import transformer
import utils


class Model(nn.Module):
    def __init__(self, vocab_size, n_embd):
        super().__init__()
        assert checks.WHOSE == transformer.WHOSE == utils.WHOSE == "{whose}"
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, tokens):
        import late

        assert late.WHOSE == "{whose}"
        return self.head(self.embedding(tokens).cumsum(dim=1)) * {scale}
"""
THEIRS = ("checks", "transformer", "utils", "late", "timeit", "tests", "conftest", "random", "torch")


def folder_of(path: Path, whose: str, scale: float = 1.0) -> Path:
    """A student's folder in which nearly every name is taken."""
    path.mkdir(exist_ok=True)
    (path / "model.py").write_text(MODEL.format(whose=whose, scale=scale))
    for name in THEIRS:
        if name == "conftest":
            text = ""
        elif name in ("timeit", "random", "torch"):
            text = 'raise RuntimeError("this is no standard library")\n'
        else:
            text = f'WHOSE = "{whose}"\n'
        (path / f"{name}.py").write_text(text)
    return path


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


CAUSALITY = ("-k", "check_contract", "--seed", "1", "-p", "no:cacheprovider", "-q")


def test_by_pytest(tmp_path):
    folder = folder_of(tmp_path / "student", "student")
    pytest_command = str(Path(sys.executable).with_name("pytest"))
    result = run(pytest_command, "--model", "model.py", *CAUSALITY, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks ran" in result.stdout


def test_by_python_m_checks_from_outside(tmp_path):
    folder_of(tmp_path / "student", "student")
    result = run(sys.executable, "-m", "transformer_checks", "student/model.py", *CAUSALITY, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_by_python_m_checks_from_inside(tmp_path):
    """With -P: without it, Python itself runs the student's checks.py, before any code of ours."""
    folder = folder_of(tmp_path / "student", "student")
    result = run(sys.executable, "-P", "-m", "transformer_checks", "model.py", *CAUSALITY, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_timeit_of_their_own_does_not_meet_python_m_checks(tmp_path):
    folder = folder_of(tmp_path / "student", "student")
    for name in ("checks", "torch"):
        (folder / f"{name}.py").unlink()
    source = (folder / "model.py").read_text().replace("import checks\n", "").replace("checks.WHOSE == ", "")
    (folder / "model.py").write_text(source)
    result = run(sys.executable, "-m", "transformer_checks", "model.py", *CAUSALITY, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


def test_by_a_command_of_its_own_from_inside(tmp_path):
    """What an installer makes of the project's script: it needs no -P, for Python looks beside the script first."""
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["transformer-checks"].partition(":")
    command = tmp_path / "bin" / "transformer-checks"
    command.parent.mkdir()
    command.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    folder = folder_of(tmp_path / "student", "student")
    result = run(sys.executable, str(command), "model.py", *CAUSALITY, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "checks ran" in result.stdout


def test_a_file_called_like_a_standard_module_is_said_to(tmp_path):
    (tmp_path / "random.py").write_text("def noise(x):\n    return x\n")
    (tmp_path / "model.py").write_text("import torch\nfrom random import noise\n")
    (tmp_path / "other.py").write_text(
        "import random\nfrom torch import nn\n\n\nclass GPT(nn.Module):\n    def __init__(self, vocab_size):\n"
        "        super().__init__()\n        self.noise = random.noise(1)\n"
    )
    for name in ("model.py", "other.py"):
        with pytest.raises(UsageError, match=r"give random\.py beside it another name") as refusal:
            Subject.meet(str(tmp_path / name))
        assert name in str(refusal.value)


NOTEBOOK = """
from transformer_checks import check_model

report = check_model("model.py", checks=["contract"], seed=1)
assert report.passed, report
from transformer_checks.transformer.model import Transformer
"""


def test_from_a_notebooks_working_directory(tmp_path):
    """Its kernel has the working directory on the path, where the names checked here would win: ours is imported."""
    folder = folder_of(tmp_path / "student", "student")
    start = f"import sys, torch, transformer_checks, random; sys.path.insert(0, {str(folder)!r})\n"
    result = run(sys.executable, "-P", "-c", start + NOTEBOOK, cwd=folder)
    assert result.returncode == 0, result.stderr


def test_two_files_of_one_name_are_two_models(tmp_path):
    one = Subject.meet(str(folder_of(tmp_path / "one", "one") / "model.py"))
    two = Subject.meet(str(folder_of(tmp_path / "two", "two", scale=2.0) / "model.py"))
    tokens = one.tokens(2, 5)
    a, b = one.build(), two.build()
    assert type(a) is not type(b)
    assert not one.logits(a, tokens).equal(two.logits(b, tokens))
    assert (2.0 * one.logits(a, tokens)).allclose(two.logits(b, tokens))


def test_nothing_of_theirs_stays(tmp_path):
    folder = folder_of(tmp_path / "student", "student")
    path, ours = list(sys.path), {n: m for n, m in sys.modules.items() if n.startswith("transformer_checks")}
    subject = Subject.meet(str(folder / "model.py"))
    subject.logits(subject.build(), subject.tokens(2, 3))
    assert sys.path == path
    assert {n: sys.modules.get(n) for n in ours} == ours
    theirs = [name for name, m in sys.modules.items() if str(folder) in str(getattr(m, "__file__", ""))]
    assert theirs == []
    assert not (folder / "__pycache__").exists()


def test_a_class_of_theirs_can_still_import_when_it_runs(tmp_path):
    """`import late` stands inside forward: their folder is there again whenever their code runs."""
    subject = Subject.meet(str(folder_of(tmp_path / "student", "student") / "model.py"))
    model = subject.build()
    for _ in range(2):
        assert subject.logits(model, subject.tokens(1, 4)).shape == (1, 4, 17)
    assert "late" not in sys.modules


CONFTEST = """
def pytest_addoption(parser):
    for name in ("--gpu", "--device", "--seed", "--model"):
        parser.addoption(name, default="theirs")
"""
TEST = """
import pytest


@pytest.mark.parametrize("name", ["gpu", "device", "seed", "model"])
def test_the_option_is_the_repositorys(request, name):
    assert request.config.getoption(name) == ("mine" if name == "model" else "theirs")
"""


@pytest.mark.parametrize("folder", [".", "tests"])
def test_a_repository_with_options_of_these_names_runs_its_own_tests(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "conftest.py").write_text(CONFTEST)
    (tmp_path / folder / "test_theirs.py").write_text(TEST)
    result = run(sys.executable, "-m", "pytest", folder, "--model", "mine", "-p", "no:cacheprovider", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout and "subject:" not in result.stdout
