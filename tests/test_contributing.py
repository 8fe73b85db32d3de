"""CONTRIBUTING.md, followed word by word in a copy of the repository; the paths that our documents name exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.order import all_checks, check_id
from transformer_checks.checks.run.subjects import subject_of
from transformer_checks.checks.run.verdict import judge

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("checks", "transformer", "src", "tests", "conftest.py", "pytest.ini")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def add(copy: Path, text: str) -> None:
    """A block of code goes into the file that its first line names: at the end, or as a new file."""
    path = copy / text.partition("\n")[0].removeprefix("# ")
    before = path.read_text(encoding="utf-8") + "\n\n" if path.exists() else ""
    path.write_text(before + text.partition("\n")[2], encoding="utf-8")


def change(copy: Path, text: str) -> None:
    """The lines with a minus, which the file must have once, become those with a plus."""
    first, *lines = text.splitlines()
    path = copy / first.removeprefix("# ")
    old, new = ("".join(line[1:] + "\n" for line in lines if line[0] == sign) for sign in "-+")
    before = path.read_text(encoding="utf-8")
    assert before.count(old) == 1, f"{path.name} has no longer the lines\n{old}"
    path.write_text(before.replace(old, new), encoding="utf-8")


def run(copy: Path, line: str) -> None:
    """A command prints what its comment says."""
    command, _, said = line.partition("#")
    program, *arguments = shlex.split(command)
    assert program == "pytest"
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"]
    done = subprocess.run(whole, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert said.strip() in done.stdout + done.stderr, f"{line}\n{done.stdout}{done.stderr}"


def test_the_examples_do_what_is_said(copy):
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    seen = []
    for language, text in blocks:
        if language == "python":
            add(copy, text)
        elif language == "diff":
            change(copy, text)
        elif text.startswith("pytest"):
            for line in text.splitlines():
                run(copy, line)
        seen.append(language)
    assert seen.count("python") == 3 and seen.count("diff") == 2


def test_an_example_is_formatted_as_our_code_is():
    for _, text in (block for block in BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()) if block[0] == "python"):
        command = [sys.executable, "-m", "ruff", "format", "--diff", "--line-length", "120", "-"]
        done = subprocess.run(command, input=text.partition("\n")[2], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_paths_that_a_document_names_exist(document):
    text = BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    named = re.findall(r"`([\w.*-]+/[\w./*-]*)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    ours = [path for path in named if path.split("/")[0] in (*COPIED, "benchmarks", "power") or path.endswith(".md")]
    assert len(ours) > 1 or document == "SECURITY.md"
    assert not [path for path in ours if path.split("/")[0] != "out" and not list(ROOT.glob(path))]


def test_the_layout_in_the_readme_is_that_of_the_repository():
    (layout,) = (text for _, text in BLOCK.findall((ROOT / "README.md").read_text()) if "meet/" in text)
    folders = set(re.findall(r"(\w+)/(?:\s|$)", layout))
    there = {path.name for root in ("", "checks", "src") for path in (ROOT / root).iterdir() if path.is_dir()}
    assert folders <= there
    assert folders >= {path.parent.name for path in (ROOT / "checks").glob("*/__init__.py")}


def test_the_finding_in_the_readme_is_one_of_ours(monkeypatch):
    """Its wording is a copy, made by hand; the facts in it are those of the run that it shows."""
    monkeypatch.chdir(ROOT)
    shown = next(text for _, text in BLOCK.findall((ROOT / "README.md").read_text()) if text.startswith("$ pytest"))
    bug, seed = re.search(r"--model bug:(\S+) --seed (\d+)", shown).groups()
    name = re.search(r"^✗ (\S+)$", shown, re.MULTILINE)[1]
    check = next(check for check in all_checks() if check_id(check) == name)
    verdict = judge(check, subject_of(f"bug:{bug}", seed=int(seed)), {})
    assert verdict.outcome == "failed" and verdict.likely[0] == bug
    assert verdict.reproduce in shown
    assert f"{verdict.where.module} ({verdict.where.type}, {verdict.where.file}:" in shown
    for number in re.findall(r"\d[\d.e-]*\d", " ".join(re.findall(r"  what (.*?)\n  \w", shown, re.DOTALL))):
        assert number in verdict.says
    assert all_bugs()[bug].says in " ".join(shown.split())
