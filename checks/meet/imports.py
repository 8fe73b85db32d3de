"""A subject's file, notebook or module brought in, on the terms of its home and under nobody's name but its own."""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import importlib
import importlib.machinery
import json
import linecache
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import vocabulary
from .definitions import STUB, SoftImports, definitions, dropped, is_main_guard, is_script
from .errors import UsageError, namesake, own_frames, place, shown, what_happened
from .sandbox import Home, installed, random_state_kept
from .stubs import NOT_RUN, Stub, left_out, stub_for

LOADING_SECONDS = 60.0
# What the machine lacks is excused, what the code gets wrong is not.
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


@dataclass
class Source:
    """The code of one module: a tree for a file, one a cell for a notebook."""

    trees: tuple[ast.Module, ...]
    filenames: tuple[str, ...]

    @property
    def body(self) -> list[ast.stmt]:
        return [statement for tree in self.trees for statement in tree.body]

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return [node for tree in self.trees for node in ast.walk(tree)]

    @functools.cached_property
    def guarded(self) -> dict[str, Any]:
        """Literals that are assigned under `if __name__ == "__main__":`, which a module does not run."""
        found = {}
        for statement in self.body:
            for node in statement.body if isinstance(statement, ast.If) and is_main_guard(statement) else ():
                if isinstance(node, ast.Assign):
                    with contextlib.suppress(ValueError):
                        value = ast.literal_eval(node.value)
                        found.update({t.id: value for t in node.targets if isinstance(t, ast.Name)})
        return found

    def assigns(self, name: str) -> bool:
        """Whether the module's own code gives the name a value."""
        return any(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store) for n in self.nodes)

    @functools.cached_property
    def free_names(self) -> tuple[str, ...]:
        """Names that functions read and do not themselves define: globals."""
        found: set[str] = set()
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                stored = {n.id for n in named if not isinstance(n.ctx, ast.Load)}
                stored |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
                found |= {n.id for n in named if isinstance(n.ctx, ast.Load)} - stored
        return tuple(sorted(found))


class SubjectLoader(importlib.machinery.SourceFileLoader):
    """Runs one of the subject's own files; leaves no bytecode behind."""

    def __init__(self, home: Home, fullname: str, path: str, wanted: tuple[str, ...] = ()) -> None:
        super().__init__(fullname, path)
        self.home, self.wanted = home, wanted

    def exec_module(self, module: ModuleType) -> None:
        text = importlib.util.decode_source(self.get_data(self.path))
        tree = ast.parse(text, self.path)
        source = Source((tree,), (self.path,))
        self.home.sources[module.__name__] = source
        fresh = dict(vars(module))
        if not is_script(tree):
            try:
                return run(source, module, self.home)
            except BaseException as error:
                if not excused(error, self.home):
                    raise
                why = f"{place(error, self.home)} raised {type(error).__name__} at import"
                vars(module).clear()
                vars(module).update(fresh)
                source = self.home.sources[module.__name__] = Source((ast.parse(text, self.path),), (self.path,))
        else:
            why = f"{shown(self.path)} works at import"
        take(source, module, self.home, self.wanted, why)


def excused(error: BaseException, home: Home) -> bool:
    """Whether the machine is to blame: a file, library, device, network or argument that is not there."""
    if isinstance(error, SystemExit):
        return any(frame.filename.endswith("argparse.py") for frame in traceback.extract_tb(error.__traceback__))
    if isinstance(error, ImportError) and error.path is not None and home.owns(error.path):
        return False
    if namesake(str(error), home):
        return False
    return isinstance(error, LACKS) or any(word in str(error).lower() for word in LACKING)


def run(source: Source, module: ModuleType, home: Home) -> None:
    for tree, filename in zip(source.trees, source.filenames, strict=True):
        code = _compile(SoftImports().visit(tree), filename)
        vars(module)[STUB] = _Stands(home, filename)
        exec(code, vars(module))


def take(source: Source, module: ModuleType, home: Home, wanted: tuple[str, ...], why: str) -> None:
    """Definitions only; an assignment that fails is passed over, and said."""
    left: list[int] = []
    flags = _future(source)
    for tree, filename in zip(source.trees, source.filenames, strict=True):
        kept = definitions(tree, wanted)
        skipped = dropped(tree, kept)
        vars(module)[STUB] = _Stands(home, filename)
        for statement in SoftImports().visit(kept).body:
            if not _define(statement, filename, flags, module):
                skipped.append(statement.lineno)
        cell = filename.partition("[cell ")[2].removesuffix("]")
        left += [int(cell)] * bool(skipped) if cell else skipped
    unit = "cell" if source.filenames[0].endswith("]") else "line"
    places = f", not {unit}{'s' * (len(set(left)) > 1)} {_ranges(left)}" if left else ""
    home.remark(f"{why}: took its imports, classes, functions and constants{places}")


def _define(statement: ast.stmt, filename: str, flags: int, module: ModuleType) -> bool:
    """Runs one statement. What a definition needs of statements that were left out is a size or a stand-in."""
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


class _Stands:
    """Called by an import of the subject that failed: gives stand-ins, or raises what is the subject's own fault."""

    def __init__(self, home: Home, filename: str) -> None:
        self.home, self.filename = home, filename

    def __call__(self, asked: tuple[tuple[str, str, str], ...], error: Exception) -> tuple[Any, ...]:
        if self._own_fault(error) and not self._left_out(asked, error):
            raise error
        found = tuple(self._one(module, name, error) for module, name, _ in asked)
        if any(isinstance(value, Stub) for value in found):
            self.home.remark(f"{asked[0][0]} could not be imported: a stand-in is used")
        return found

    def _left_out(self, asked: tuple[tuple[str, str, str], ...], error: Exception) -> bool:
        """Whether it is a value of a module of which only the definitions were taken."""
        source = self.home.sources.get(getattr(error, "name", None) or "")
        missing = [name for module, name, _ in asked if name and not hasattr(sys.modules.get(module), name)]
        return source is not None and bool(missing) and all(source.assigns(name) for name in missing)

    def _own_fault(self, error: Exception) -> bool:
        if isinstance(error, ModuleNotFoundError):
            return False
        if isinstance(error, ImportError):
            mine = error.path is not None and not installed(error.path)
            return mine or bool(namesake(str(error), self.home))
        deeper = [frame for frame in own_frames(error, self.home) if frame.filename != self.filename]
        broken = isinstance(error, SyntaxError) and self.home.owns(error.filename or "<frozen")
        return broken or bool(deeper)

    def _one(self, module: str, name: str, error: Exception) -> Any:
        top = sys.modules.get(module.partition(".")[0])
        if not name:
            return top if top is not None else stub_for(module.partition(".")[0], "", error)
        real = sys.modules.get(module)
        if real is not None and hasattr(real, name):
            return getattr(real, name)
        source = self.home.sources.get(module)
        if source is not None and source.assigns(name):
            return left_out(module, name, shown(source.filenames[0]))
        return stub_for(module, name, error)


# -- the three kinds of source


def load_file(home: Home, file: Path, wanted: tuple[str, ...] = ()) -> ModuleType:
    """A `.py` file under its own name, or its dotted name inside its package, or a notebook."""

    def load() -> ModuleType:
        if file.suffix == ".ipynb":
            return _notebook(home, file, wanted)
        return _by_name(home, file, wanted)

    return _loaded(home, load, shown(str(file)))


def load_module(home: Home, name: str) -> ModuleType:
    """An importable module; the working directory is importable too."""
    return _loaded(home, lambda: importlib.import_module(name), name)


def _loaded(home: Home, load: Callable[[], ModuleType], what: str) -> ModuleType:
    try:
        with random_state_kept(), home.bounded(LOADING_SECONDS), home:
            return load()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{what} could not be loaded\n  {what_happened(error, home)}") from None


def package_of(file: Path) -> tuple[Path, str]:
    """The folder from which the file is imported and its dotted name: packages by __init__.py or by its imports."""
    up = _levels(file)
    parts, folder = [file.stem], file.parent
    while (up > 0 or (folder / "__init__.py").exists()) and folder.name.isidentifier() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder, up = folder.parent, up - 1
    return folder, ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _levels(file: Path) -> int:
    """How many folders above the file its imports name as packages: `from ..parts`, `from model.parts` in model/."""
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


def _by_name(home: Home, file: Path, wanted: tuple[str, ...]) -> ModuleType:
    _, dotted = package_of(file)
    package, _, _ = dotted.rpartition(".")
    if package:
        try:
            importlib.import_module(package)
        except Exception as error:
            _bare(home, file, package, error)
    name = dotted if dotted.replace(".", "").isidentifier() else "subject"
    if file.name == "__init__.py" and name in sys.modules:
        return sys.modules[name]
    loader = SubjectLoader(home, name, str(file), wanted)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(file))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    home.names.add(name)
    sys.modules[name] = module
    loader.exec_module(module)
    if package and package in sys.modules:  # as an import would: code of the package may read it there
        setattr(sys.modules[package], name.rpartition(".")[2], sys.modules.get(name, module))
    return sys.modules.get(name, module)


def _bare(home: Home, file: Path, package: str, error: Exception) -> None:
    """Packages without what their __init__.py does: the file itself may not need it."""
    parts = package.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(file.parents[len(parts) - depth])]
            sys.modules[name] = module
            home.names.add(name)
    home.remark(f"{package}/__init__.py was passed over: {type(error).__name__}: {str(error)[:80]}")


def _notebook(home: Home, file: Path, wanted: tuple[str, ...]) -> ModuleType:
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
            home.remark(f"cell {number} was passed over: {error.msg}")
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    home.names.add(module.__name__)
    sys.modules[module.__name__] = module
    home.sources[module.__name__] = source = Source(tuple(trees), tuple(filenames))
    take(source, module, home, wanted, f"{shown(str(file))} is a notebook")
    return module


def _plain_python(text: str) -> str:
    """A cell without its magics, every line in its place."""
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
