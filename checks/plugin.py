"""pytest's hooks and nothing else: what they do lies in run/.

A run that is not about a model pays nothing: no torch, no hypothesis, and no option that a conftest has already.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .meet.errors import UsageError
from .report import lines, terminal
from .run import REFERENCE
from .run.items import BENCHMARKS, BenchmarkFile, CheckFile, CheckItem, NotTests, Run, argument, theme_of
from .run.libraries import import_for_good
from .run.options import OPTIONS, Options
from .run.order import CHECKS, position
from .run.session import NOTHING_RAN, Record, Session
from .run.strength import rank

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
    config.args = [argument(text, config.invocation_params.dir) for text in config.args]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and isinstance(item, CheckItem) and item.verdict is not None:
        report.verdict = lines.plain({"subject": item.subject.name, **item.verdict.as_dict()})
    return report


class Hooks:
    """The hooks of one pytest run over some subjects, which are loaded when they are first asked for."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker: dict[str, Any] | None = getattr(config, "workerinput", None)  # what one of several processes gets
        self.options = Options(self._option, seed=None if self.worker is None else int(self.worker["checks_seed"]))
        self.sessions: dict[str, Session] = {}
        self.shared: str | None = None if self.worker is None else self.worker["checks_shared"]  # a folder
        self.first: pytest.TestReport | None = None  # the first finding, shown when it is found
        self.written: list[str] = []  # pictures and reports
        self.problems: list[str] = []  # beside the checks
        self.measured: list[str] = []  # by benchmarks, a line each
        self.unmeasured: list[str] = []  # why not
        self._runs: list[Run] | None = None
        self._first_use = False  # whether torch was imported for this run

    def _option(self, name: str) -> Any:
        """An option's value; an option of this name that a conftest defined is not ours to read."""
        if f"--{name}" not in self.config.stash.get(OURS, ()):
            return None
        return self.config.getoption(OPTIONS[f"--{name}"].get("dest", name.replace("-", "_")))

    def runs(self) -> list[Run]:
        """The subjects, each with its session."""
        if self._runs is None:
            self._first_use = import_for_good("torch")
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
            self.sessions[name] = Session(
                name,
                slow=bool(self.options.get("slow")),
                budget=self.options.get("budget"),
                write=self._write,
                out=out,
                shared=None if self.shared is None else self._shared(len(self.sessions)),
            )
        return self.sessions[name]

    def _shared(self, number: int) -> Any:
        from .run.processes import Shared

        return Shared(Path(str(self.shared), str(number)))

    # -- collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """What is wrong with the command line is said before anything is collected."""
        self._append("")
        if not self.options.asked:
            return
        self.runs()
        if self._controls and self._reporter is not None:
            for line in self._header():
                self._reporter.write_line(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Our folder is collected as files: as a package, pytest would import a second copy of it, called `checks`."""
        return pytest.Dir.from_parent(parent, path=path) if path in (CHECKS, CHECKS.parent) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path == BENCHMARKS and (self.options.get("gpu") or parent.session.isinitpath(file_path)):
            return BenchmarkFile.from_parent(parent, path=file_path)
        return CheckFile.of(file_path, parent.session, self.runs) if theme_of(file_path) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """pytest itself looks for tests in a file that is named on the command line, beside what is collected above."""
        ours = theme_of(module_path) or module_path == BENCHMARKS
        return NotTests.from_parent(parent, path=module_path) if ours else None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, Any, Any]:
        """Subject by subject, what catches much in little time first; what selects among them comes after that."""
        mine = [item for item in items if isinstance(item, CheckItem)]
        others = [item for item in items if not isinstance(item, CheckItem)]
        subjects = self.subjects if mine else []
        items[:] = [*others, *sorted(mine, key=lambda i: (subjects.index(i.subject), rank(i.check.id)))]
        names = [item.name for item in mine]
        for item in mine:
            item.name = item.check.name  # for -k: the model's file may be called cache.py
        try:
            return (yield)
        finally:
            for item, name in zip(mine, names, strict=True):
                item.name = name

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, CheckItem):
                item.checks_session.choose([item.check])
                item.checks_session.waiting.add(item.nodeid)

    # -- several processes

    @property
    def _controls(self) -> bool:
        """Whether this process only hands out checks: it loads the model while the others start, and not before."""
        return self.config.pluginmanager.has_plugin("dsession")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if not self.options.asked or config.getvalue("dist") != "load":
            return None
        from .run.processes import scheduler

        return scheduler(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        self.shared = self.shared or tempfile.mkdtemp(prefix="transformer-checks-")
        node.workerinput |= {"checks_seed": self.options.seed, "checks_shared": self.shared}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        for id in ids:
            file, _, name = id.partition("::")
            if theme_of(self.config.rootpath / file):
                self._session(name.partition("[")[2].removesuffix("]")).waiting.add(id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        left: dict[str, list[str]] = getattr(node, "workeroutput", {})
        self.written += left.get("checks_written", [])
        self.problems += left.get("checks_problems", [])

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        if self._first_use:  # the process ends with this run, and need not look for garbage in half a million objects
            gc.freeze()
        if self.worker is None and self.shared is not None:
            shutil.rmtree(self.shared, ignore_errors=True)

    # -- header and summary

    def pytest_report_header(self) -> list[str]:
        return self._header() if self.options.asked and not self._controls else []

    def _header(self) -> list[str]:
        return [f"model: {subject.header}" for subject in self.subjects] + [f"seed: {self.options.seed}"]

    @property
    def _reporter(self) -> pytest.TerminalReporter | None:
        reporter: pytest.TerminalReporter | None = self.config.pluginmanager.get_plugin("terminalreporter")
        return reporter

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Checks change from file to file: their names before each dot would be all that is seen."""
        ours = bool(theme_of(self.config.rootpath / nodeid.partition("::")[0]))
        if (reporter := self._reporter) is not None and reporter.showfspath and ours:
            reporter.ensure_newline()
            reporter.showfspath = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        record: Record | None = getattr(report, "verdict", None)
        if record is not None:
            self._session(record["subject"]).add(record, report.nodeid)
            if report.failed and self.worker is None:
                self._show(report)
        elif report.skipped:  # by a mark
            for session in self.sessions.values():
                session.waiting.discard(report.nodeid)
        for name, line in report.user_properties if report.when == "teardown" else ():
            kept = {"benchmark": self.measured, "no benchmark": self.unmeasured}.get(name, [])
            if line not in kept:
                kept.append(str(line))

    def _show(self, report: pytest.TestReport) -> None:
        """Prints the first finding at once; among the failures at the end, a line stands for it."""
        reporter = self._reporter
        if self.first is None and reporter is not None and self.config.option.tbstyle != "no":
            self.first = report
            reporter.ensure_newline()
            reporter.write_line("")
            reporter.write_line(report.longreprtext, red=True)
            reporter.write_line("")

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        record: Record | None = getattr(report, "verdict", None)
        if record is None or report.when != "call" or record["outcome"] not in ("not_applicable", "blocked"):
            return None
        word = record["outcome"].replace("_", " ")
        return word, {"not applicable": "-", "blocked": "b"}[word], f"{word}: {record['says']}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        judged = [mine for mine in self.sessions.values() if mine.records or mine.waiting]
        for mine in judged:
            self.written += map(str, mine.draw())
            self.problems += mine.problems
        if self.worker is not None:
            output: dict[str, Any] = getattr(self.config, "workeroutput")  # noqa: B009  # which pytest-xdist gives it
            output |= {"checks_written": self.written, "checks_problems": self.problems}
            return
        for mine in judged:
            if mine.records:
                self._write(mine.summary())
        self._order_failures()
        if session.items and all(isinstance(item, CheckItem) for item in session.items):
            self._drop_unused_hypothesis()
        if not self.options.asked or session.exitstatus != pytest.ExitCode.OK or self.config.option.collectonly:
            return
        nothing = not judged or any(not mine.executed and not mine.waiting for mine in judged)
        if nothing and not self.measured:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif not all(mine.green for mine in judged):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _drop_unused_hypothesis(self) -> None:
        """Its plugin would import all of Hypothesis, to report at the end that it did nothing."""
        plugins = self.config.pluginmanager
        if "hypothesis" not in sys.modules and (unused := plugins.get_plugin("hypothesispytest")):
            plugins.unregister(unused)

    def _order_failures(self) -> None:
        """The failures that pytest shows at the end, in the order of the themes."""
        reporter = self._reporter
        if reporter is None:
            return
        names = list(self.sessions)

        def place(report: pytest.TestReport) -> tuple[int, int]:
            record: Record | None = getattr(report, "verdict", None)
            return (-1, 0) if record is None else (names.index(record["subject"]), position(record["check"]))

        reporter.stats.get("failed", []).sort(key=place)
        if self.first is not None:
            self.first.longrepr = "shown above, as it was found"

    def _shorten_failures(self) -> None:
        """To the fault alone: pytest's last lines repeat each failure, in full where CI is set."""
        reporter = self._reporter
        for report in reporter.stats.get("failed", []) if reporter is not None else ():
            if (record := getattr(report, "verdict", None)) is not None:
                report.longrepr = record["says"].partition("\n")[0]

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
        for report in (path for path in self.written if path.endswith(".md")):
            write(f"report: {report}")
        for problem in self.problems:
            write(problem, red=True)
        self._shorten_failures()

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
