"""Imports a user's file, notebook or module inside its sandbox, under its own name.

A file that trains, reads data or parses arguments at import is not run as a whole: only its definitions are.
"""

from __future__ import annotations
import __future__

import ast
import importlib
import importlib.machinery
import json
import linecache
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..expect import shown
from . import vocabulary
from .definitions import STUB, SoftImports, definitions, dropped, is_script
from .errors import UsageError, namesake, own_frames, place, what_happened
from .process import random_state_restored
from .sandbox import Sandbox, installed
from .source import Source
from .stubs import NOT_RUN, Stub, left_out, stub_for

LOADING_SECONDS = 60.0
# Errors by which the machine lacks something. They are forgiven; mistakes in the code are not.
LACKS = (OSError, ImportError, EOFError)
LACKING = (
    "no such file",
    "cuda",
    "nvidia",
    "gpu",
    "nccl",
    "default process group",
    "no package metadata",
    "not compiled",
)


class SubjectLoader(importlib.machinery.SourceFileLoader):
    """Runs one of the user's own files; leaves no bytecode behind."""

    def __init__(self, sandbox: Sandbox, fullname: str, path: str, wanted: tuple[str, ...] = ()) -> None:
        super().__init__(fullname, path)
        self.sandbox, self.wanted = sandbox, wanted

    def exec_module(self, module: ModuleType) -> None:
        text = importlib.util.decode_source(self.get_data(self.path))
        tree = ast.parse(text, self.path)
        source = Source((tree,), (self.path,))
        self.sandbox.sources[module.__name__] = source
        fresh = dict(vars(module))
        if not is_script(tree):
            try:
                return run(source, module, self.sandbox)
            except BaseException as error:
                if not lacks_something(error, self.sandbox):
                    raise
                why = f"{place(error, self.sandbox)} raised {type(error).__name__} at import"
                vars(module).clear()
                vars(module).update(fresh)
                source = self.sandbox.sources[module.__name__] = Source((ast.parse(text, self.path),), (self.path,))
        else:
            why = f"{shown(self.path)} is a script"
        run_definitions(source, module, self.sandbox, self.wanted, why)


def lacks_something(error: BaseException, sandbox: Sandbox) -> bool:
    """Whether the cause is the machine: a file, library, device, network or command-line argument is missing."""
    if isinstance(error, SystemExit):
        return any(frame.filename.endswith("argparse.py") for frame in traceback.extract_tb(error.__traceback__))
    if isinstance(error, ImportError) and error.path is not None and sandbox.owns(error.path):
        return False
    if namesake(str(error), sandbox):
        return False
    return isinstance(error, LACKS) or any(word in str(error).lower() for word in LACKING)


def run(source: Source, module: ModuleType, sandbox: Sandbox) -> None:
    for tree, filename in zip(source.trees, source.filenames, strict=True):
        code = _compile(SoftImports().visit(tree), filename)
        vars(module)[STUB] = _Placeholders(sandbox, filename)
        exec(code, vars(module))


def run_definitions(source: Source, module: ModuleType, sandbox: Sandbox, wanted: tuple[str, ...], why: str) -> None:
    """Runs definitions only. An assignment that fails is skipped; a remark names what was."""
    left: list[int] = []
    flags = _future(source)
    for tree, filename in zip(source.trees, source.filenames, strict=True):
        kept = definitions(tree, wanted)
        skipped = dropped(tree, kept)
        vars(module)[STUB] = _Placeholders(sandbox, filename)
        for statement in SoftImports().visit(kept).body:
            if not _define(statement, filename, flags, module):
                skipped.append(statement.lineno)
        cell = filename.partition("[cell ")[2].removesuffix("]")
        left += [int(cell)] * bool(skipped) if cell else skipped
    unit = "cell" if source.filenames[0].endswith("]") else "line"
    places = f", not {unit}{'s' * (len(set(left)) > 1)} {_ranges(left)}" if left else ""
    sandbox.remark(f"{why}: only its imports, classes, functions and constants were run{places}")


def _define(statement: ast.stmt, filename: str, flags: int, module: ModuleType) -> bool:
    """Runs one statement. A name from a line that was not run, if a definition needs it, is a size or a placeholder."""
    definition = not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.If | ast.Try)
    code = _compile(ast.Module([statement], []), filename, flags)
    for _ in range(30):
        try:
            exec(code, vars(module))
            return True
        except NameError as error:
            if not definition or not error.name or error.name in vars(module):
                if definition:
                    raise
                return False
            vars(module)[error.name] = _assumed(error.name)
        except Exception:
            if definition or isinstance(statement, ast.Try):
                raise
            return False
    return False


def _assumed(name: str) -> Any:
    size = vocabulary.size_of(name)
    return vocabulary.DEFAULTS[size] if size else Stub(name, NOT_RUN)


def _compile(tree: ast.AST, filename: str, flags: int = 0) -> Any:
    return compile(ast.fix_missing_locations(tree), filename, "exec", flags, dont_inherit=True)  # type: ignore[call-overload]


def _future(source: Source) -> int:
    asked = {a.name for s in source.body if isinstance(s, ast.ImportFrom) and s.module == "__future__" for a in s.names}
    return sum(getattr(__future__, name).compiler_flag for name in asked)


def _ranges(lines: list[int]) -> str:
    shown_lines = sorted(set(lines))
    return ", ".join(map(str, shown_lines[:6])) + (" …" if len(shown_lines) > 6 else "")


class _Placeholders:
    """Called where an import of the user's fails: gives placeholders, or raises if the error is their own mistake."""

    def __init__(self, sandbox: Sandbox, filename: str) -> None:
        self.sandbox, self.filename = sandbox, filename

    def __call__(self, asked: tuple[tuple[str, str, str], ...], error: Exception) -> tuple[Any, ...]:
        if self._own_fault(error) and not self._left_out(asked, error):
            raise error
        found = tuple(self._one(module, name, error) for module, name, _ in asked)
        if any(isinstance(value, Stub) for value in found):
            self.sandbox.remark(f"{asked[0][0]} could not be imported: a placeholder is used")
        return found

    def _left_out(self, asked: tuple[tuple[str, str, str], ...], error: Exception) -> bool:
        """Whether it is a value of a module of which only the definitions were run."""
        source = self.sandbox.sources.get(getattr(error, "name", None) or "")
        missing = [name for module, name, _ in asked if name and not hasattr(sys.modules.get(module), name)]
        return source is not None and bool(missing) and all(source.assigns(name) for name in missing)

    def _own_fault(self, error: Exception) -> bool:
        if isinstance(error, ModuleNotFoundError):
            return False
        if isinstance(error, ImportError):
            mine = error.path is not None and not installed(error.path)
            return mine or bool(namesake(str(error), self.sandbox))
        deeper = [frame for frame in own_frames(error, self.sandbox) if frame.filename != self.filename]
        broken = isinstance(error, SyntaxError) and self.sandbox.owns(error.filename or "<frozen")
        return broken or bool(deeper)

    def _one(self, module: str, name: str, error: Exception) -> Any:
        top = sys.modules.get(module.partition(".")[0])
        if not name:
            return top if top is not None else stub_for(module.partition(".")[0], "", error)
        real = sys.modules.get(module)
        if real is not None and hasattr(real, name):
            return getattr(real, name)
        source = self.sandbox.sources.get(module)
        if source is not None and source.assigns(name):
            return left_out(module, name, shown(source.filenames[0]))
        return stub_for(module, name, error)


# -- the three kinds of source


def load_file(sandbox: Sandbox, file: Path, wanted: tuple[str, ...] = ()) -> ModuleType:
    """A notebook, or a `.py` file under its own name or its dotted name inside its package."""

    def load() -> ModuleType:
        if file.suffix == ".ipynb":
            return _notebook(sandbox, file, wanted)
        return _by_name(sandbox, file, wanted)

    return _loaded(sandbox, load, shown(str(file)))


def load_module(sandbox: Sandbox, name: str) -> ModuleType:
    """An importable module; the working directory is importable too."""
    return _loaded(sandbox, lambda: importlib.import_module(name), name)


def _loaded(sandbox: Sandbox, load: Callable[[], ModuleType], what: str) -> ModuleType:
    try:
        with random_state_restored(), sandbox.limited_to(LOADING_SECONDS), sandbox:
            return load()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} could not be loaded\n  {what_happened(error, sandbox)}") from None


def package_of(file: Path) -> tuple[Path, str]:
    """The folder from which the file is imported, and its dotted name; its imports or __init__.py show the package."""
    up = _levels(file)
    parts, folder = [file.stem], file.parent
    while (up > 0 or (folder / "__init__.py").exists()) and folder.name.isidentifier() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder, up = folder.parent, up - 1
    return folder, ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _levels(file: Path) -> int:
    """How many folders above the file are packages by its imports: `from ..parts`, or `from model.parts` in model/."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return 0
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    above = {folder.name: level for level, folder in reversed(list(enumerate(file.parents[:3], start=1)))}
    named = [(above.get(first, 0), rest) for first, rest in (_halves(node.module or "") for node in imports)]
    own = [level for level, rest in named if level and rest and _holds(file.parents[level - 1], rest)]
    return max([*own, *(node.level for node in imports)], default=0)


def _halves(module: str) -> tuple[str, str]:
    first, _, rest = module.partition(".")
    return first, rest.partition(".")[0]


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def _by_name(sandbox: Sandbox, file: Path, wanted: tuple[str, ...]) -> ModuleType:
    _, dotted = package_of(file)
    package, _, _ = dotted.rpartition(".")
    if package:
        try:
            importlib.import_module(package)
        except Exception as error:
            _without_init(sandbox, file, package, error)
    name = dotted if dotted.replace(".", "").isidentifier() else "subject"
    if file.name == "__init__.py" and name in sys.modules:
        return sys.modules[name]
    loader = SubjectLoader(sandbox, name, str(file), wanted)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(file))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sandbox.names.add(name)
    sys.modules[name] = module
    loader.exec_module(module)
    if package and package in sys.modules:  # as an import does: code of the package may read it there
        setattr(sys.modules[package], name.rpartition(".")[2], sys.modules.get(name, module))
    return sys.modules.get(name, module)


def _without_init(sandbox: Sandbox, file: Path, package: str, error: Exception) -> None:
    """Makes the packages without running their __init__.py: the file itself may not need it."""
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(file.parents[len(parts) - depth])]
            sys.modules[name] = module
            sandbox.names.add(name)
    sandbox.remark(f"{package}/__init__.py was skipped: {type(error).__name__}: {str(error)[:80]}")


def _notebook(sandbox: Sandbox, file: Path, wanted: tuple[str, ...]) -> ModuleType:
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{shown(str(file))} is not a notebook: no JSON with cells") from None
    trees, filenames = [], []
    for number, cell in enumerate(cells, start=1):
        if cell.get("cell_type") != "code":
            continue
        text, filename = _plain_python("".join(cell["source"])), f"{file}[cell {number}]"
        linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename
        try:
            trees.append(ast.parse(text, filename))
            filenames.append(filename)
        except SyntaxError as error:
            sandbox.remark(f"cell {number} was skipped: {error.msg}")
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    sandbox.names.add(module.__name__)
    sys.modules[module.__name__] = module
    sandbox.sources[module.__name__] = source = Source(tuple(trees), tuple(filenames))
    run_definitions(source, module, sandbox, wanted, f"{shown(str(file))} is a notebook")
    return module


def _plain_python(text: str) -> str:
    """A cell without its magics; line numbers stay."""
    lines = text.splitlines()
    first = lines[0].strip() if lines else ""
    if first.startswith("%%") and not first.startswith(("%%time", "%%capture", "%%timeit", "%%prun")):
        return ""
    return "\n".join("pass" if line.startswith(("%", "!", "?")) else _without_magic(line) for line in lines) + "\n"


def _without_magic(line: str) -> str:
    stripped = line.lstrip()
    if stripped.startswith(("%", "!")) or stripped.endswith("?"):
        return line[: len(line) - len(stripped)] + "pass"
    return line
