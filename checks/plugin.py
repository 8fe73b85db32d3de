"""The door through pytest: options, collection of the checks, one verdict a check, the summary.

It costs a run that is not about a subject nothing: no torch, no hypothesis, and no option that a conftest has already.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import secrets
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from .report import lines, terminal

if TYPE_CHECKING:
    from .run.expected_failures import Expected
    from .run.verdict import Verdict
    from .subject import Subject

CHECKS = Path(__file__).parent
BENCHMARKS = CHECKS / "bench_training.py"
DEFAULT_MODEL = "transformer"
EXECUTED = ("passed", "failed", "error")

OURS = pytest.StashKey[set[str]]()  # the options that are ours in this run
PATH = pytest.StashKey[list[str]]()  # sys.path before conftests put their folders first

OPTIONS: dict[str, dict[str, Any]] = {
    "--model": dict(
        action="append",
        metavar="WHAT",
        help="the model to check: FILE.py[:NAME], NOTEBOOK.ipynb[:NAME], package.module:NAME or bug:ID; repeatable",
    ),
    "--with": dict(
        action="append",
        dest="checks_with",
        metavar="PART=FILE:NAME",
        help="a part that lives elsewhere: loss, generate, train_step, trainer or tokenizer; repeatable",
    ),
    "--checkpoint": dict(metavar="FILE", help="weights to load into the model that was built"),
    "--spec": dict(
        metavar="FAMILY",
        help="what the model should be: gpt2, llama, or auto (report only); gpt2:FILE.json with a table of which "
        "weight is which, as -v shows it",
    ),
    "--not-causal": dict(action="store_true", help="the model is an encoder or a prefix model by design"),
    "--device": dict(metavar="DEVICE", help="where the checks run: cpu (the default), cuda, mps, xpu"),
    "--gpu": dict(action="store_true", help="run the checks on CUDA, and then the benchmarks of steps and decoding"),
    "--slow": dict(action="store_true", help="also the checks that take minutes: compilers, new processes"),
    "--seed": dict(type=int, metavar="N", help="seed of everything that is drawn (default: a fresh one, printed)"),
    "--out": dict(metavar="FOLDER", help="where the sanity checks leave their artifacts (default: out)"),
    "--verdicts": dict(metavar="FILE", help="one JSON line a verdict, written as they happen"),
    "--expected-failures": dict(
        metavar="FILE", help="checks that are known to fail, one `check: reason` a line; one that passes is an error"
    ),
}


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
    config.addinivalue_line("markers", "sanity: the two sanity checks of a subject")
    run = Run(config)
    config.pluginmanager.register(run, "transformer-checks-run")
    if run.asked:
        _conftests_last(config.stash.get(PATH, list(sys.path)))
        if config.args_source != config.ArgsSource.ARGS:
            config.args = [str(CHECKS)]


def _conftests_last(before: list[str]) -> None:
    """A torch.py or random.py beside a conftest is not found in place of the installed one that the checks need."""
    sys.path[:] = [*before, *(folder for folder in sys.path if folder not in before)]


class Run:
    """One pytest run over some subjects: meets them when first asked, judges, keeps the verdicts."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.verdicts: dict[str, dict[str, Verdict]] = {}
        self.reported: dict[str, list[dict[str, Any]]] = {}
        self.totals: dict[str, int] = {}
        self.chosen: dict[str, set[str]] = {}  # by subject, node ids of checks that are to run and have no verdict yet
        self.passed_over: set[str] = set()  # those that a mark skips
        self.complaints: list[str] = []  # what went wrong beside the checks
        self.written: list[Path] = []  # pictures and reports
        self.measured: list[str] = []  # by benchmarks, a line each
        self.unmeasured: list[str] = []  # why not
        self._subjects: list[Subject] | None = None

    def option(self, name: str, default: Any = None) -> Any:
        """An option's value; an option of this name that a conftest defined is not ours to read."""
        if f"--{name}" not in self.config.stash.get(OURS, ()):
            return default
        value = self.config.getoption(OPTIONS[f"--{name}"].get("dest", name.replace("-", "_")))
        return default if value is None else value

    @property
    def asked(self) -> bool:
        """Whether the command line is about a subject: one of our options is given."""
        return any(self.option(name.removeprefix("--")) for name in OPTIONS)

    @property
    def seed(self) -> int:
        worker = getattr(self.config, "workerinput", None)
        if worker is not None:
            return int(worker["checks_seed"])
        if not hasattr(self, "_seed"):
            self._seed = int(self.option("seed", secrets.randbelow(2**31)))
        return self._seed

    @property
    def subjects(self) -> list[Subject]:
        if self._subjects is None:
            self._subjects = self._meet()
        return self._subjects

    def _meet(self) -> list[Subject]:
        from .meet import UsageError
        from .run.subjects import subject_of

        declared = dict(
            seed=self.seed,
            device=self._device(),
            causal=not self.option("not-causal", False),
            checkpoint=self.option("checkpoint"),
            parts=_parts(self.option("with", [])),
            spec=self.option("spec", "auto"),
        )
        try:
            self.expected = self._expected()
            subjects = [subject_of(model, **declared) for model in self.option("model", [DEFAULT_MODEL])]
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None
        return subjects

    def _expected(self) -> Expected:
        from .run.expected_failures import Expected, read
        from .run.order import all_checks, check_id

        path = self.option("expected-failures")
        return read(path, map(check_id, all_checks())) if path else Expected()

    def _device(self) -> str:
        import torch

        device = "cuda" if self.option("gpu") else self.option("device", "cpu")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise pytest.UsageError(f"no CUDA device here: the installed torch is {torch.__version__}")
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            says = str(error).splitlines()[0].split(". ")[0]
            raise pytest.UsageError(f"--device {device}: torch {torch.__version__} says: {says}") from None
        return device

    # -- collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """What is wrong with the command line is said before anything is collected."""
        self._write_lines("")
        if self.asked:
            self.subjects  # noqa: B018

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """Our folder is collected as files: as a package, pytest would import a second copy of it, called `checks`."""
        return pytest.Dir.from_parent(parent, path=path) if path in (CHECKS, CHECKS.parent) else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path == BENCHMARKS and (self.option("gpu") or parent.session.isinitpath(file_path)):
            return BenchmarkFile.from_parent(parent, path=file_path)
        if file_path.parent != CHECKS or file_path.suffix != ".py" or not file_path.stem.startswith("check_"):
            return None
        return CheckFile.from_parent(parent, path=file_path, run=self)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        """pytest itself takes a file that is named on the command line for tests, beside what is collected above."""
        ours = module_path.parent == CHECKS and module_path.name.startswith(("check_", "bench_"))
        return NotTests.from_parent(parent, path=module_path) if ours else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Subject by subject, theme by theme: what others need comes first."""
        from .run.order import THEMES

        mine = [item for item in items if isinstance(item, CheckItem)]
        others = [item for item in items if not isinstance(item, CheckItem)]
        items[:] = [*others, *sorted(mine, key=lambda item: (item.subject_index, THEMES.index(item.theme)))]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if isinstance(item, CheckItem):
                self.chosen.setdefault(self.subjects[item.subject_index].name, set()).add(item.nodeid)

    # -- header and summary

    def pytest_report_header(self) -> list[str]:
        if not self.asked:
            return []
        return [f"subject: {subject.header}" for subject in self.subjects] + [f"seed: {self.seed}"]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["checks_seed"] = self.seed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        verdict = getattr(report, "verdict", None)
        if report.skipped and verdict is None:
            self.passed_over.add(report.nodeid)
        if verdict is not None:
            self.chosen.get(verdict["subject"], set()).discard(report.nodeid)
            self.reported.setdefault(verdict["subject"], []).append(verdict)
        for name, line in report.user_properties if report.when == "teardown" else ():
            kept = {"benchmark": self.measured, "no benchmark": self.unmeasured}.get(name, [])
            if line not in kept:
                kept.append(str(line))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        verdict = getattr(report, "verdict", None)
        if verdict is None or report.when != "call" or verdict["outcome"] not in ("not_applicable", "blocked"):
            return None
        word = verdict["outcome"].replace("_", " ")
        return word, {"not applicable": "-", "blocked": "b"}[word], f"{word}: {verdict['says']}"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return
        for name, verdicts in self.reported.items():
            self._write(lines.summary(name, verdicts, self.totals.get(name, len(verdicts))))
        if self._subjects:
            self._draw()
        if self.asked and session.exitstatus == pytest.ExitCode.OK and not self.config.option.collectonly:
            session.exitstatus = self._exit_code()

    def _exit_code(self) -> pytest.ExitCode:
        """Of a run in which nothing failed: it is green if every subject had checks and each of them a verdict."""
        unjudged = {name: sorted(chosen - self.passed_over) for name, chosen in self.chosen.items()}
        for name, left in unjudged.items():
            if left:
                some = ", ".join(nodeid.rpartition("::")[2] for nodeid in left[:3]) + ", …" * (len(left) > 3)
                self.complaints.append(f"not green: {len(left)} checks of {name} were to run and did not: {some}")
        if any(unjudged.values()):
            return pytest.ExitCode.TESTS_FAILED
        ran = [any(v["outcome"] in EXECUTED for v in verdicts) for verdicts in self.reported.values()]
        return pytest.ExitCode.OK if self.measured or (ran and all(ran)) else pytest.ExitCode.NO_TESTS_COLLECTED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, verdicts in self.reported.items():
            terminalreporter.section(name, sep="-")
            for verdict in verdicts:
                for remark in verdict["remarks"]:
                    terminalreporter.line(f"note: {verdict['check']}: {remark}")
            for line in terminal.weights(verdicts) if self.config.get_verbosity() > 0 else ():
                terminalreporter.line(line)
            summary = lines.summary(name, verdicts, self.totals.get(name, len(verdicts)))["summary"]
            terminalreporter.line(terminal.totals(summary))
            if not summary["executed"]:
                terminalreporter.line("no check ran: this says nothing about the model", red=True)
                for reason in dict.fromkeys(v["says"] for v in verdicts if v["outcome"] == "not_applicable"):
                    terminalreporter.line(f"not applicable: {reason}")
            if start := terminal.where_to_start(verdicts):
                terminalreporter.line(start, red=True)
        if self.measured or self.unmeasured:
            terminalreporter.section("benchmarks: in turn in one process; only ratios mean much", sep="-")
        for line in (*self.measured, *self.unmeasured):
            terminalreporter.line(line)
        for report in (path for path in self.written if path.suffix == ".md"):
            terminalreporter.line(f"report: {report}")
        for complaint in self.complaints:
            terminalreporter.line(complaint, red=True)

    # -- judging

    def judge(self, subject: Subject, check: Callable) -> Verdict:
        from .run.order import check_id
        from .run.verdict import judge

        earlier = self.verdicts.setdefault(subject.name, {})
        self._write(lines.started(check_id(check), subject.name))
        verdict = judge(check, subject, earlier)
        earlier[verdict.check] = verdict
        self._write({"subject": subject.name, **verdict.as_dict()})
        if verdict.kept:
            self._save(subject, verdict)
        return verdict

    def _save(self, subject: Subject, verdict: Verdict) -> None:
        from ..transformer.checkpoint import CheckpointError
        from .run import sanity_artifacts as artifacts

        try:
            artifacts.save_run(self.folder(subject), verdict)
        except (OSError, CheckpointError) as error:
            self._unwritable(error)

    def _unwritable(self, error: Exception) -> None:
        """A verdict stands whether or not its artifacts could be kept."""
        message = f"artifacts under {self.option('out', 'out')} are incomplete: {error}"
        if message not in self.complaints:
            self.complaints.append(message)

    def _write(self, record: dict[str, Any]) -> None:
        self._write_lines(lines.line(record) + "\n")

    def _write_lines(self, text: str) -> None:
        path = self.option("verdicts")
        if path is None:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise pytest.UsageError(f"--verdicts {path}: {error.strerror}") from None

    def _draw(self) -> None:
        """Pictures and reports of the sanity checks, once, at the end."""
        for subject in self.subjects:
            verdicts = self.verdicts.get(subject.name, {}).values()
            if any(verdict.kept for verdict in verdicts):
                from .run import sanity_artifacts as artifacts

                try:
                    self.written += artifacts.finish(self.folder(subject), subject.name, verdicts)
                except OSError as error:
                    self._unwritable(error)

    def folder(self, subject: Subject) -> Path:
        """`out` for the reference, `out/<subject>` for another."""
        out = Path(self.option("out", "out"))
        return out if subject.name == DEFAULT_MODEL else out / "".join(c if c.isalnum() else "-" for c in subject.name)


def _parts(given: list[str]) -> dict[str, str]:
    bad = [text for text in given if "=" not in text]
    if bad:
        raise pytest.UsageError(f"--with {bad[0]}: expected PART=FILE:NAME, as in --with loss=train.py:masked_loss")
    return dict(text.split("=", 1) for text in given)  # type: ignore[misc]


class CheckFile(pytest.File):
    """A `check_*.py`: every check in it, for every subject."""

    def __init__(self, *, run: Run, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run

    def collect(self) -> Iterator[pytest.Item]:
        from .run.order import checks_in

        theme = self.path.stem.removeprefix("check_")
        checks = checks_in(theme)
        for index, subject in enumerate(self.run.subjects):
            self.run.totals[subject.name] = self.run.totals.get(subject.name, 0) + len(checks)
            for check in checks:
                name = f"{check.__name__}[{subject.name}]"
                yield CheckItem.from_parent(self, name=name, check=check, theme=theme, subject_index=index)


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
        return importlib.import_module(f"{__package__}.{self.path.stem}")


class CheckItem(pytest.Item):
    """One check of one subject."""

    def __init__(self, *, check: Callable, theme: str, subject_index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.check, self.theme, self.subject_index = check, theme, subject_index
        assert isinstance(self.parent, CheckFile)
        self.run = self.parent.run
        self.verdict: Verdict | None = None
        if getattr(check, "sanity", False):
            self.add_marker("sanity")
        if (reason := getattr(check, "slow", None)) and not self.run.option("slow"):
            self.add_marker(pytest.mark.skip(reason=f"slow: {reason}; --slow runs it"))

    def runtest(self) -> None:
        run = self.run
        self.verdict = run.judge(run.subjects[self.subject_index], self.check)
        if reason := run.expected.reason(self.verdict.as_dict()):
            pytest.xfail(reason)
        for complaint in run.expected.complaints([self.verdict.as_dict()]):
            pytest.fail(complaint, pytrace=False)
        if self.verdict.outcome in ("failed", "error"):
            raise CheckBroken(self.verdict)
        if self.verdict.outcome != "passed":
            pytest.skip(self.verdict.says)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, CheckBroken):
            return terminal.failure(excinfo.value.verdict.as_dict(), _explain)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[os.PathLike[str], int | None, str]:
        return self.path, self.check.__code__.co_firstlineno, self.name


class CheckBroken(Exception):
    """Carries a failing verdict to pytest."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.says)
        self.verdict = verdict


def _explain(bug: str) -> str:
    from .bugs import all_bugs

    known = all_bugs().get(bug)
    return f"{bug}: {known.says}" if known else bug


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and isinstance(item, CheckItem) and item.verdict is not None:
        subject = item.run.subjects[item.subject_index]
        report.verdict = {"subject": subject.name, **item.verdict.as_dict()}
    return report
