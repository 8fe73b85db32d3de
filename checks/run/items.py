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
from .order import CHECKS, PACKAGE, Check, checks_in

if TYPE_CHECKING:
    from ..subject import Subject
    from .session import Session
    from .verdict import Verdict

BENCHMARKS = CHECKS / "bench_training.py"
Run = tuple["Subject", "Session"]


def is_theme(path: Path) -> bool:
    """Whether a file is one of ours that holds checks."""
    return path.parent == CHECKS and path.suffix == ".py" and path.stem.startswith("check_")


class CheckFile(pytest.File):
    """A `check_*.py`: every check in it, for every subject; `runs` gives the subjects when they are needed."""

    def __init__(self, *, runs: Callable[[], list[Run]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runs = runs

    def collect(self) -> Iterator[pytest.Item]:
        theme = self.path.stem.removeprefix("check_")
        checks = checks_in(theme)
        for subject, session in self.runs():
            session.total += len(checks)
            for check in checks:
                name = f"{check.__name__}[{subject.name}]"
                yield CheckItem.from_parent(
                    self, name=name, check=check, theme=theme, subject=subject, session_of_subject=session
                )


class CheckItem(pytest.Item):
    """One check of one subject."""

    def __init__(
        self, *, check: Check, theme: str, subject: Subject, session_of_subject: Session, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.check, self.theme, self.subject, self.checks_session = check, theme, subject, session_of_subject
        self.verdict: Verdict | None = None
        if getattr(check, "sanity", False):
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
        return self.path, self.check.__code__.co_firstlineno, self.name


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
