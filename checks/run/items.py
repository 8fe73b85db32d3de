"""The checks as pytest collects and runs them: a file per theme, an item per check and subject."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from ..report import terminal
from . import BROKEN
from .diagnosis import explain
from .order import CHECKS, PACKAGE, Listed, listed

if TYPE_CHECKING:
    from ..subject import Subject
    from .session import Session
    from .verdict import Verdict

BENCHMARKS = CHECKS / "bench_training.py"
Run = tuple["Subject", "Session"]


def theme_of(path: Path) -> str:
    """The theme of a file of ours that holds checks; "" for any other file."""
    theme = path.stem.removeprefix("check_")
    return theme if path == CHECKS / f"check_{theme}.py" else ""


def argument(text: str, folder: Path) -> str:
    """A node id that was printed elsewhere, `…/check_cache.py::check_x[model.py]`, as an argument that pytest finds."""
    file, colons, names = text.partition("::")
    ours = CHECKS / Path(file).name
    return f"{ours}{colons}{names}" if colons and theme_of(ours) and not (folder / file).exists() else text


class CheckFile(pytest.File):
    """A `check_*.py`: every check in it, for every subject; `runs` gives the subjects when they are needed.

    It hangs from the session, so that `-k` does not find the words in the names of the folders that it lies in.
    """

    def __init__(self, *, runs: Callable[[], list[Run]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runs = runs

    @classmethod
    def of(cls, path: Path, session: pytest.Session, runs: Callable[[], list[Run]]) -> CheckFile:
        inside = path.is_relative_to(session.config.rootpath)
        # A way out of the root (../../lib/…) would not be found by those who look a node id up: --lf, the command line.
        id = (path.relative_to(session.config.rootpath) if inside else path).as_posix()
        file: CheckFile = cls.from_parent(session, path=path, name=path.stem, nodeid=id, runs=runs)
        return file

    def collect(self) -> Iterator[pytest.Item]:
        for subject, session in self.runs():
            for check in listed(theme_of(self.path)):
                name = f"{check.name}[{subject.name}]"
                # Given as text, so that pytest divides it as it will when it reads it again.
                id = f"{self.nodeid}::{name}"
                yield CheckItem.from_parent(
                    self, name=name, nodeid=id, check=check, subject=subject, session_of_subject=session
                )


class CheckItem(pytest.Item):
    """One check of one subject."""

    def __init__(self, *, check: Listed, subject: Subject, session_of_subject: Session, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check, self.subject, self.checks_session = check, subject, session_of_subject
        self.verdict: Verdict | None = None
        if check.theme == "sanity":
            self.add_marker("sanity")

    def runtest(self) -> None:
        session = self.checks_session
        self.verdict = session.judge(self.check, self.subject)
        record = self.verdict.as_dict()
        if reason := session.reason(record):
            pytest.xfail(reason)
        for complaint in session.expected.complaints([record]):
            pytest.fail(complaint, pytrace=False)
        if self.verdict.outcome in BROKEN:
            raise CheckBroken(self.verdict)
        if self.verdict.outcome != "passed":
            pytest.skip(self.verdict.says)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckBroken):
            return terminal.failure(excinfo.value.verdict.as_dict(), explain)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str], int | None, str]:
        return self.path, self.check.line - 1, self.name


class CheckBroken(Exception):
    """Carries a failing verdict to pytest."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.says)
        self.verdict = verdict


class NotTests(pytest.File):
    """A file of ours in which pytest's own collection finds nothing."""

    def collect(self) -> list[pytest.Item]:
        return []


class BenchmarkFile(pytest.Module):
    """`bench_training.py`, whose functions are called `bench_*`."""

    def funcnamefilter(self, name: str) -> bool:
        return name.startswith("bench_")

    def _getobj(self) -> ModuleType:
        """The module under the name by which the rest of us knows it, and not a second copy of it."""
        return importlib.import_module(f"{PACKAGE}.{self.path.stem}")
