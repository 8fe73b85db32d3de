"""Sandbox for user code: its import path, time limit, captured output, restored global state.

`with sandbox:` surrounds every moment in which the subject's code runs. Inside, the modules beside its file win over
others of the same name, never over the standard library, torch or this package; `sys.exit` and `os._exit` raise; time
is bounded; printing is bounded. Afterwards modules, paths and global settings are as they were.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.abc
import importlib.machinery
import os
import pdb
import random
import signal
import site
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy
import torch

from .settings import Project, folders_above
from .source import Source

RUNNING_SECONDS = 60.0  # of one call into the subject's code
PRINTED_CHARACTERS = 10_000  # what a subject may print before the rest is dropped

NEVER_THEIRS = sys.stdlib_module_names | {
    "torch", "numpy", "pytest", "_pytest", "hypothesis", "pluggy", __name__.partition(".")[0],
}  # fmt: skip
INSTALLED = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values())
        if "data" not in path and path not in (sys.prefix, sys.base_prefix)
    }
)


class SubjectExit(RuntimeError):
    """The subject's code tried to end the process."""


class SubjectHang(RuntimeError):
    """The subject's code ran longer than it may."""


class SubjectWaits(RuntimeError):
    """The subject's code waits for a person: at a debugger's prompt or for input."""


class _TimeIsUp(BaseException):
    """Raised by the alarm; not an Exception, so that a subject's `except Exception` does not swallow it."""


def installed(filename: str) -> bool:
    """Whether a source file belongs to the standard library or an installed distribution, or is no file at all."""
    return filename.startswith(("<frozen", "<string>")) or os.path.realpath(filename).startswith(INSTALLED)


OUR_FOLDERS = tuple(str(Path(__file__).resolve().parents[2] / name) + os.sep for name in ("checks", "transformer"))


# What runs a module of the subject: from its sandbox, dotted name and file.
Loader = Callable[["Sandbox", str, str], importlib.abc.Loader]


class Sandbox:
    """Of a subject from a file: its folder first, then the folders above it up to its project's root.

    A subject given as an object has no folders; the terms on which it runs are the same.
    """

    def __init__(
        self, file: Path | None = None, package_root: Path | None = None, loader: Loader | None = None
    ) -> None:
        self.file = file
        self.near = list(dict.fromkeys(p for p in (package_root, file.parent) if p)) if file else []
        self.far = folders_above(file.parent, self.near) if file else []
        self.names: set[str] = set()  # of modules that are the subject's own
        self.modules: dict[str, ModuleType] = {}  # the same, kept here while its code does not run
        self.changed: list[str] = []  # global settings that its code left changed, put back by us
        self.main = ""  # dotted name of the module of its file
        self.sources: dict[str, Source] = {}  # the code of its modules
        self.looked_into: set[str] = set()  # those of them that the subject itself does not use
        self.remarks: list[str] = []  # what was skipped or stood in for while its files were loaded
        self.project = Project(file, self.near, self.far)
        self.printed = 0
        self.argv = [str(file)] if file else list(sys.argv[:1])
        # Asked before and after everything installed: the folders above give what nobody else knows.
        self._finders = (_Neighbours(self, self.near, loader), _Neighbours(self, self.far, loader))
        self._path: list[str] | None = None
        self._depth = 0
        self._restore: contextlib.ExitStack | None = None
        self._collides = True
        self.seconds = RUNNING_SECONDS

    def owns(self, filename: str) -> bool:
        """Whether a source file is the subject's: not installed, not ours."""
        return not installed(filename) and not os.path.realpath(filename).startswith(OUR_FOLDERS)

    def modules_now(self) -> dict[str, ModuleType]:
        """The subject's own modules by name, inside `with sandbox:` and outside."""
        return {n: sys.modules[n] for n in self.names if n in sys.modules} if self._depth else self.modules

    def dotted(self, path: Path, root: Path) -> str:
        """The name under which the subject itself imports another of its files."""
        for base in (*self.near, root):
            if path.is_relative_to(base):
                return ".".join(path.relative_to(base).with_suffix("").parts)
        return path.stem

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    # -- coming and going

    def __enter__(self) -> Sandbox:
        self._depth += 1
        if self._depth == 1:
            with contextlib.ExitStack() as stack:
                for terms in (self._settings, self._modules, self._exits, self._output, self._time):
                    stack.enter_context(terms())
                self._restore = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._restore is not None:
            restore, self._restore = self._restore, None
            restore.close()
        if isinstance(error, SystemExit):
            raise SubjectExit(f"the subject's code called sys.exit({error.code!r})").with_traceback(trace) from None
        if isinstance(error, _TimeIsUp) and self._depth == 0:
            says = f"the subject's code was still running after {self.seconds:g} s"
            raise SubjectHang(says).with_traceback(trace) from None

    @contextlib.contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Inside, and entered from outside, the subject's code gets this much time."""
        before, self.seconds = self.seconds, seconds
        try:
            yield
        finally:
            self.seconds = before

    # -- modules

    @contextlib.contextmanager
    def _modules(self) -> Iterator[None]:
        if not self.near:
            yield
            return
        hidden = self._hide()
        path, argv = list(sys.path), sys.argv
        if self._path is not None:
            sys.path[:] = self._path
        sys.argv = list(self.argv)
        sys.modules.update(self.modules)
        near, far = self._finders
        sys.meta_path.insert(0, near)
        sys.meta_path.append(far)
        try:
            yield
        finally:
            for finder in self._finders:
                with contextlib.suppress(ValueError):
                    sys.meta_path.remove(finder)
            self._path = list(sys.path) if list(sys.path) != path else None
            sys.path[:], sys.argv = path, argv
            self.modules = {name: sys.modules.pop(name) for name in self.names if name in sys.modules}
            sys.modules.update(hidden)

    def _hide(self) -> dict[str, ModuleType]:
        """Takes modules out of sys.modules that would be found in place of the subject's own."""
        if not self._collides:
            return {}
        theirs = {name for finder in self._finders for name in finder.names()}
        hidden = {}
        for name, module in list(sys.modules.items()):
            top = name.partition(".")[0]
            if top in theirs and top not in NEVER_THEIRS and self._gives_way(top, module):
                hidden[name] = sys.modules.pop(name)
        self._collides = bool(hidden)
        return hidden

    def _gives_way(self, top: str, module: ModuleType) -> bool:
        if top in self._finders[0].names():
            return True
        file = getattr(sys.modules.get(top, module), "__file__", None) or getattr(module, "__file__", None)
        return file is not None and not installed(file)

    # -- the rest of the terms

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        before = {name: read() for name, (read, _) in SETTINGS.items()}
        try:
            yield
        finally:
            for name, (read, write) in SETTINGS.items():
                if read() != before[name]:
                    if name not in self.changed:
                        self.changed.append(name)
                    write(before[name])

    @contextlib.contextmanager
    def _exits(self) -> Iterator[None]:
        real, process = os._exit, os.getpid()

        def refuse(status: int = 0) -> Any:
            if os.getpid() != process:  # a forked worker ends as it always does
                real(status)
            raise SubjectExit(f"the subject's code called os._exit({status!r})")

        def wait(*args: Any, **kwargs: Any) -> Any:
            raise SubjectWaits("the subject's code stops for a debugger or for input: nobody is there to answer")

        prompts = (sys, "breakpointhook"), (pdb, "set_trace"), (builtins, "input")
        before = [getattr(place, name) for place, name in prompts]
        os._exit = refuse  # type: ignore[assignment]
        for place, name in prompts:
            setattr(place, name, wait)
        try:
            yield
        finally:
            os._exit = real
            for (place, name), function in zip(prompts, before, strict=True):
                setattr(place, name, function)

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        streams = sys.stdout, sys.stderr
        mine = tuple(_Bounded(stream, self) for stream in streams)
        sys.stdout, sys.stderr = mine  # type: ignore[assignment]
        try:
            yield
        finally:
            if sys.stdout is mine[0]:
                sys.stdout = streams[0]
            if sys.stderr is mine[1]:
                sys.stderr = streams[1]

    @contextlib.contextmanager
    def _time(self) -> Iterator[None]:
        """An alarm, where there can be one: on the main thread of a Unix system."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
            yield
            return

        def ring(number: int, frame: FrameType | None) -> None:
            raise _TimeIsUp

        handler = signal.signal(signal.SIGALRM, ring)
        remaining, interval = signal.setitimer(signal.ITIMER_REAL, self.seconds, 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)
            signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)


# What running code may leave changed for everyone: how to read it and how to put it back.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]),
    ),
    "the default device": (torch.get_default_device, lambda device: torch.set_default_device(_plain(device))),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "the precision of matrix products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
    ),
    "the working directory": (os.getcwd, os.chdir),
}  # fmt: skip


def _plain(device: torch.device) -> torch.device | None:
    """The CPU is the default by there being no default."""
    return None if device.type == "cpu" else device


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """The random state of torch, NumPy and `random`, the environment and the warning filters as before, afterwards."""
    states = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    environment, filters = dict(os.environ), warnings.filters[:]
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]


class _Bounded:
    """A stream that lets the first characters through and then says that it drops the rest."""

    def __init__(self, stream: Any, sandbox: Sandbox) -> None:
        self._stream, self._home = stream, sandbox

    def write(self, text: str) -> int:
        room = PRINTED_CHARACTERS - self._home.printed
        self._home.printed += len(text)
        if room > 0:
            self._stream.write(text[:room])
            if len(text) > room:
                self._stream.write(f"\n[more than {PRINTED_CHARACTERS} characters printed: the rest is dropped]\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Neighbours(importlib.abc.MetaPathFinder):
    """Finds the subject's own modules in some of its folders."""

    def __init__(self, sandbox: Sandbox, folders: list[Path], loader: Loader | None) -> None:
        self.sandbox, self.folders, self._loader = sandbox, folders, loader
        self._names: frozenset[str] | None = None

    def names(self) -> frozenset[str]:
        """Top-level modules and packages that lie in the folders."""
        if self._names is None:
            found: set[str] = set()
            for folder in self.folders:
                with contextlib.suppress(OSError):
                    found.update(_modules_in(folder))
            self._names = frozenset(found)
        return self._names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None:
            mine = fullname.rpartition(".")[0] in self.sandbox.names
            return self._mine(fullname, PathFinder.find_spec(fullname, path)) if mine else None
        if fullname in NEVER_THEIRS:
            return None
        package, _, inside = self.sandbox.main.partition(".")
        near = self.folders[:1] if inside and fullname == package else self.folders  # not model/model.py for model
        spec = PathFinder.find_spec(fullname, [str(folder) for folder in near])
        if spec is not None and spec.origin is None and self._installed(fullname):
            return None  # a folder without __init__.py gives way to an installed package, as everywhere in Python
        return self._mine(fullname, spec)

    def _installed(self, name: str) -> bool:
        spec = PathFinder.find_spec(name, sys.path)
        return spec is not None and spec.origin is not None

    def _mine(self, fullname: str, spec: ModuleSpec | None) -> ModuleSpec | None:
        if spec is not None:
            self.sandbox.names.add(fullname)
            if self._loader is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
                spec.loader = self._loader(self.sandbox, fullname, str(spec.origin))
        return spec


def _modules_in(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        stem, ending = os.path.splitext(entry.name)
        if stem.isidentifier() and (ending == ".py" or (not ending and entry.is_dir())):
            yield stem
