"""pytest's hooks and nothing else: what they do lies in run/.

A run that is not about a model pays nothing: no torch, no hypothesis, and no option that a conftest has already.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .meet.errors import UsageError
from .report import lines, terminal
from .run import REFERENCE
from .run.items import BENCHMARKS, BenchmarkFile, CheckFile, CheckItem, NotTests, Run, is_theme
from .run.options import OPTIONS, Options
from .run.order import CHECKS, THEMES
from .run.session import NOTHING_RAN, Record, Session

if TYPE_CHECKING:
    from .subject import Subject

OURS = pytest.StashKey[set[str]]()  # the options that are ours in this run
PATH = pytest.StashKey[list[str]]()  # sys.path before conftests put their folders first


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser) -> Iterator[None]:
    """Options are added after the conftests had their turn: where one defines `--gpu` itself, theirs stays theirs."""
    early_config.stash[PATH] = list(sys.path)
    yield
    group = parser.getgroup("transformer-checks", "transformer-checks")
    ours = early_config.stash.setdefault(OURS, set())
    for name, attributes in OPTIONS.items():
        with contextlib.suppress(ValueError, argparse.ArgumentError):
            group.addoption(name, **attributes)
            ours.add(name)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sanity: the two sanity checks of a model")
    hooks = Hooks(config)
    config.pluginmanager.register(hooks, "transformer-checks-run")
    if hooks.options.asked:
        before = config.stash.get(PATH, list(sys.path))
        # A torch.py or random.py beside a conftest must not be found in place of the installed one.
        sys.path[:] = [*before, *(folder for folder in sys.path if folder not in before)]
        if config.args_source != config.ArgsSource.ARGS:
            config.args = [str(CHECKS)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and isinstance(item, CheckItem) and item.verdict is not None:
        report.verdict = {"subject": item.subject.name, **item.verdict.as_dict()}
    return report


class Hooks:
    """The hooks of one pytest run over some subjects, which are loaded when they are first asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        worker = getattr(config, "workerinput", None)
        self.options = Options(self._option, seed=None if worker is None else int(worker["checks_seed"]))
        self.sessions: dict[str, Session] = {}
        self.written: list[Path] = []  # pictures and reports
        self.measured: list[str] = []  # by benchmarks, a line each
        self.unmeasured: list[str] = []  # why not
        self._runs: list[Run] | None = None

    def _option(self, name: str) -> Any:
        """An option's value; an option of this name that a conftest defined is not ours to read."""
        if f"--{name}" not in self.config.stash.get(OURS, ()):
            return None
        return self.config.getoption(OPTIONS[f"--{name}"].get("dest", name.replace("-", "_")))

    def runs(self) -> list[Run]:
        """The subjects, each with its session."""
        if self._runs is None:
            try:
                expected = self.options.expected_failures()
                subjects = self.options.subjects()
            except UsageError as error:
                raise pytest.UsageError(str(error)) from None
            for subject in subjects:
                session = self._session(subject.name)
                session.expected = expected
            self._runs = [(subject, self.sessions[subject.name]) for subject in subjects]
        return self._runs

    @property
    def subjects(self) -> list[Subject]:
        return [subject for subject, _ in self.runs()]

    def _session(self, name: str) -> Session:
        """The session of a subject; on the controller of several processes too, which may load no subject itself."""
        if name not in self.sessions:
            out = Path(self.options.get("out", "out"))
            out = out if name == REFERENCE else out / "".join(c if c.isalnum() else "-" for c in name)
            slow = bool(self.options.get("slow"))
            self.sessions[name] = Session(name, slow=slow, write=self._write, out=out)
        return self.sessions[name]

    # -- collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """What is wrong with the command line is said before anything is collected."""
        self._append("")
        if self.options.asked:
            self.runs()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Our folder is collected as files: as a package, pytest would import a second copy of it, called `checks`."""
        return pytest.Dir.from_parent(parent, path=path) if path in (CHECKS, CHECKS.parent) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path == BENCHMARKS and (self.options.get("gpu") or parent.session.isinitpath(file_path)):
            return BenchmarkFile.from_parent(parent, path=file_path)
        return CheckFile.from_parent(parent, path=file_path, runs=self.runs) if is_theme(file_path) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """pytest itself looks for tests in a file that is named on the command line, beside what is collected above."""
        ours = is_theme(module_path) or module_path == BENCHMARKS
        return NotTests.from_parent(parent, path=module_path) if ours else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Subject by subject, theme by theme: what others need comes first."""
        mine = [item for item in items if isinstance(item, CheckItem)]
        if not mine:
            return
        others = [item for item in items if not isinstance(item, CheckItem)]
        subjects = self.subjects
        items[:] = [*others, *sorted(mine, key=lambda i: (subjects.index(i.subject), THEMES.index(i.theme)))]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, CheckItem):
                item.checks_session.waiting.add(item.nodeid)

    # -- header and summary

    def pytest_report_header(self) -> list[str]:
        if not self.options.asked:
            return []
        return [f"model: {subject.header}" for subject in self.subjects] + [f"seed: {self.options.seed}"]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["checks_seed"] = self.options.seed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record: Record | None = getattr(report, "verdict", None)
        if record is not None:
            self._session(record["subject"]).add(record, report.nodeid)
        elif report.skipped:  # by a mark
            for session in self.sessions.values():
                session.waiting.discard(report.nodeid)
        for name, line in report.user_properties if report.when == "teardown" else ():
            kept = {"benchmark": self.measured, "no benchmark": self.unmeasured}.get(name, [])
            if line not in kept:
                kept.append(str(line))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        record: Record | None = getattr(report, "verdict", None)
        if record is None or report.when != "call" or record["outcome"] not in ("not_applicable", "blocked"):
            return None
        word = record["outcome"].replace("_", " ")
        return word, {"not applicable": "-", "blocked": "b"}[word], f"{word}: {record['says']}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return
        judged = [mine for mine in self.sessions.values() if mine.records or mine.waiting]
        for mine in judged:
            if mine.records:
                self._write(mine.summary())
            self.written += mine.draw()
        if not self.options.asked or session.exitstatus != pytest.ExitCode.OK or self.config.option.collectonly:
            return
        nothing = not judged or any(not mine.executed and not mine.waiting for mine in judged)
        if nothing and not self.measured:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif not all(mine.green for mine in judged):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.line
        collected = self.config.option.collectonly
        for name, session in self.sessions.items():
            if session.records or (session.waiting and not collected):
                terminalreporter.section(name, sep="-")
                self._end_of(session, terminalreporter)
        if self.measured or self.unmeasured:
            terminalreporter.section("benchmarks: in turn in one process; only ratios mean much", sep="-")
        for line in (*self.measured, *self.unmeasured):
            write(line)
        for report in (path for path in self.written if path.suffix == ".md"):
            write(f"report: {report}")
        for session in self.sessions.values():
            for problem in session.problems:
                write(problem, red=True)

    def _end_of(self, session: Session, terminalreporter: pytest.TerminalReporter) -> None:
        for line in terminal.weights(session.records) if self.config.get_verbosity() > 0 else ():
            terminalreporter.line(line)
        for line in session.ending():
            terminalreporter.line(line)
        for complaint in session.complaints:
            terminalreporter.line(complaint, red=True)
            reasons = [r["says"] for r in session.records if r["outcome"] == "not_applicable"]
            for reason in dict.fromkeys(reasons if complaint == NOTHING_RAN else ()):
                terminalreporter.line(f"not applicable: {reason}")
        if start := session.start():
            terminalreporter.line(start, red=True)

    # -- the verdict file

    def _write(self, record: Record) -> None:
        self._append(lines.line(record) + "\n")

    def _append(self, text: str) -> None:
        path = self.options.get("verdicts")
        if path is None:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise pytest.UsageError(f"--verdicts {path}: {error.strerror}") from None
