"""Sandbox for user code: its import path, time limit, captured output, restored global state.

`with sandbox:` surrounds every moment in which user code runs. Inside, the modules beside its file win over others of
the same name, but never over the standard library, torch or this package; `sys.exit` and `os._exit` raise; time and
output are bounded. Afterwards modules, paths and global settings are as they were.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import math
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ..expect import TooSlow
from .process import (
    SLOW_CALL,
    Output,
    SubjectExit,
    SubjectHang,
    TimeIsUp,
    alarm,
    exits_refused,
    in_a_check,
    refuse_if_too_slow,
    settings_restored,
)
from .settings import Project, folders_above
from .source import Source

RUNNING_SECONDS = 60.0  # of processor time that one call into user code may take

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
OUR_FOLDERS = tuple(str(Path(__file__).resolve().parents[2] / name) + os.sep for name in ("checks", "transformer"))


@functools.cache
def installed(filename: str) -> bool:
    """Whether a source file belongs to the standard library or an installed distribution, or is no file at all."""
    return filename.startswith(("<frozen", "<string>")) or os.path.realpath(filename).startswith(INSTALLED)


# Runs a module of the user's; made from its sandbox, dotted name and file.
Loader = Callable[["Sandbox", str, str], importlib.abc.Loader]


class Sandbox:
    """The sandbox of one subject, and what is known of its files.

    For a file, imports look into its folder first, then into the folders above it up to the project's root. A subject
    given as an object has no folders; everything else holds for it as well.
    """

    def __init__(
        self, file: Path | None = None, package_root: Path | None = None, loader: Loader | None = None
    ) -> None:
        self.file = file
        self.near = list(dict.fromkeys(p for p in (package_root, file.parent) if p)) if file else []
        self.far = folders_above(file.parent, self.near) if file else []
        self.names: set[str] = set()  # of modules that are the user's own
        self.modules: dict[str, ModuleType] = {}  # these modules, kept here while their code does not run
        self.changed: list[str] = []  # global settings that user code changed and that were restored
        self.main = ""  # dotted name of the module of its file
        self.sources: dict[str, Source] = {}  # the code of its modules
        self.looked_into: set[str] = set()  # modules that were read only to find a configuration
        self.remarks: list[str] = []  # what was skipped or replaced while its files were loaded
        self.project = Project(file, self.near, self.far)
        self.seconds = RUNNING_SECONDS
        self.quickest = math.inf  # seconds of processor time of a call for logits
        self.argv = [str(file)] if file else list(sys.argv[:1])
        # One finder comes before everything installed, one after: the folders above only give what nobody else has.
        self._finders = (_Neighbours(self, self.near, loader), _Neighbours(self, self.far, loader))
        self._output = Output()
        self._path: list[str] | None = None
        self._depth = 0
        self._restore: contextlib.ExitStack | None = None
        self._collides = True

    def owns(self, filename: str) -> bool:
        """Whether a source file is the user's: neither installed nor ours."""
        return not installed(filename) and not os.path.realpath(filename).startswith(OUR_FOLDERS)

    def modules_now(self) -> dict[str, ModuleType]:
        """The user's own modules by name, inside `with sandbox:` and outside."""
        return {n: sys.modules[n] for n in self.names if n in sys.modules} if self._depth else self.modules

    def dotted(self, path: Path, root: Path) -> str:
        """The name under which user code itself imports another of its files."""
        for base in (*self.near, root):
            if path.is_relative_to(base):
                return ".".join(path.relative_to(base).with_suffix("").parts)
        return path.stem

    def remark(self, text: str) -> None:
        """Adds a line to what the header says was assumed."""
        if text not in self.remarks:
            self.remarks.append(text)

    # -- entering and leaving

    def __enter__(self) -> Sandbox:
        if self._depth == 0:
            refuse_if_too_slow()
        self._depth += 1
        if self._depth == 1:
            with contextlib.ExitStack() as stack:
                stack.enter_context(settings_restored(self.changed))
                stack.enter_context(self._own_modules())
                stack.enter_context(exits_refused())
                stack.enter_context(self._output.bounded())
                stack.enter_context(alarm(self.seconds))
                self._restore = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and self._restore is not None:
            restore, self._restore = self._restore, None
            restore.close()
        if isinstance(error, SystemExit):
            raise SubjectExit(f"your code called sys.exit({error.code!r})").with_traceback(trace) from None
        if isinstance(error, TimeIsUp) and self._depth == 0:
            if in_a_check() and SLOW_CALL <= self.quickest < math.inf:
                says = f"a call was stopped after {error}; none took less than {self.quickest:.2g} s"
                raise TooSlow(says, limit=self.seconds, quickest=self.quickest).with_traceback(trace) from None
            raise SubjectHang(f"your code was still running after {error}").with_traceback(trace) from None

    @contextlib.contextmanager
    def limited_to(self, seconds: float) -> Iterator[None]:
        """Another time limit for `with sandbox:` inside."""
        before, self.seconds = self.seconds, seconds
        try:
            yield
        finally:
            self.seconds = before

    # -- modules

    @contextlib.contextmanager
    def _own_modules(self) -> Iterator[None]:
        """The user's modules, import path and command line inside; ours outside."""
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
        """Takes modules out of sys.modules that an import would find in place of the user's own."""
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


class _Neighbours(importlib.abc.MetaPathFinder):
    """Finds the user's own modules in some of their folders."""

    def __init__(self, sandbox: Sandbox, folders: list[Path], loader: Loader | None) -> None:
        self.sandbox, self.folders, self._loader = sandbox, folders, loader
        self._names: frozenset[str] | None = None

    def names(self) -> frozenset[str]:
        """Top-level modules and packages in the folders."""
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
