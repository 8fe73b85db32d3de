"""Which model is meant: `FILE.py[:NAME]`, `NOTEBOOK.ipynb[:NAME]`, `package.module:NAME`; the one model of a file."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..expect import shown
from . import vocabulary
from .arguments import is_called, signature_of
from .errors import UsageError
from .imports import SubjectLoader, load_file, load_module, package_of
from .sandbox import Sandbox, installed
from .stubs import Stub

SUFFIXES = (".py", ".ipynb")
FACTORIES = ("build_model", "make_model", "create_model", "get_model", "build_transformer", "load_model")
COURSE = "load_model_and_tokenizer"  # (folder) -> model, tokenizer: the contract of a course
KINDS = ("model", "transformer", "gpt", "llama", "lm")
FORMS = "FILE.py[:NAME], NOTEBOOK.ipynb[:NAME] or package.module:NAME"


@dataclass(frozen=True)
class Named:
    """A module brought in for a subject, and the name asked of it ("" for the one model)."""

    sandbox: Sandbox
    module: ModuleType
    name: str
    shown: str  # model.py, package.module

    def has(self, name: str) -> bool:
        return getattr(self.module, name, None) is not None

    @property
    def scope(self) -> dict[str, Any]:
        return vars(self.module)


def named(spec: str) -> Named:
    """Loads what `spec` names. Raises UsageError for what is not there or does not load."""
    path, name = split(spec)
    if path is not None:
        return _from_file(path, name)
    module, _, name = spec.partition(":")
    file = _source_of(module, spec)
    if file is not None and not installed(str(file)):
        return _from_file(file, name, as_module=module)
    sandbox = Sandbox()
    return Named(sandbox, load_module(sandbox, module), name, module)


def split(spec: str) -> tuple[Path | None, str]:
    """A file and a name; no file for `package.module[:NAME]`. File names may contain colons themselves."""
    cuts = [i for i, letter in enumerate(spec) if letter == ":"]
    candidates = [(spec, ""), *((spec[:i], spec[i + 1 :]) for i in reversed(cuts))]
    for path, name in candidates:
        if path.endswith(SUFFIXES) and os.path.isfile(path):
            return Path(path).resolve(), name
    path, name = next(((p, n) for p, n in candidates if p.endswith(SUFFIXES)), ("", ""))
    if path or os.sep in spec:
        where = path or spec
        if os.path.isdir(where):
            raise UsageError(f"{where} is a folder; expected {FORMS}")
        raise UsageError(f"no file {where} (from {os.getcwd()}); expected {FORMS}")
    return None, ""


def _source_of(module: str, spec: str) -> Path | None:
    if not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"cannot read {spec!r} as a model: expected {FORMS}")
    here = os.getcwd()
    relative = Path(here, *module.split("."))
    for file in (relative.with_suffix(".py"), relative / "__init__.py"):
        if file.is_file():
            return file
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        found = None
    if found is None:
        raise UsageError(f"no module {module!r} here or installed; expected {FORMS}")
    return Path(found.origin) if found.origin and found.origin.endswith(".py") else None


def _from_file(file: Path, name: str, as_module: str = "") -> Named:
    sandbox = home_of(file)
    module = load_file(sandbox, file, (name,) if name else ())
    return Named(sandbox, module, name, as_module or shown(str(file)))


def home_of(file: Path) -> Sandbox:
    root, dotted = (file.parent, file.stem) if file.suffix == ".ipynb" else package_of(file)
    sandbox = Sandbox(file, root, SubjectLoader)
    sandbox.main = dotted
    return sandbox


# -- the model in a module


def asked_for(found: Named) -> list[Any]:
    """What can be the model, the likeliest first: what NAME names, else the file's factory, classes, instances."""
    if found.name:
        return [_by_name(found)]
    scope = {k: v for k, v in found.scope.items() if not k.startswith("_") and not isinstance(v, Stub)}
    if callable(scope.get("build_model")):
        return [scope["build_model"]]
    classes = _tops(found, [v for v in scope.values() if _is_model_class(v) and v.__module__ == found.module.__name__])
    factories = [v for k, v in scope.items() if inspect.isfunction(v) and _is_factory(k, v, found)]
    instances = [v for v in scope.values() if isinstance(v, nn.Module)]
    arrays = [v for v in scope.values() if _is_plain_model(v, found)]
    others = [v for v in scope.values() if _is_model_class(v) and found.sandbox.owns(inspect_file(v))]
    candidates = classes or instances or _tops(found, others) or _tops(found, arrays)
    if not candidates and not factories and callable(scope.get(COURSE)):
        return [scope[COURSE]]
    if classes:  # create_model(preset="tiny") gives a model at its own sizes: its class may take any
        factories = [function for function in factories if _takes_sizes(function)]
    return list(dict.fromkeys([*factories, *candidates]))


def second_choice(found: Named, tried: list[Any]) -> list[Any]:
    """What is left of the module where that could not be built: factories at their own sizes, classes others use."""
    own = [(k, v) for k, v in found.scope.items() if getattr(v, "__module__", "") == found.module.__name__]
    factories = [v for k, v in own if inspect.isfunction(v) and _is_factory(k, v, found)]
    classes = sorted((v for _, v in own if _is_model_class(v)), key=lambda cls: -_likeness(cls))
    return [] if found.name else [left for left in (*factories, *classes) if left not in tried]


def _takes_sizes(function: Callable) -> bool:
    """Whether a factory is told of its sizes, one by one, as a configuration or by whatever it passes on."""
    parameters = signature_of(function)
    told = any(vocabulary.size_of(p.name, required=True) or p.is_config for p in parameters.parameters)
    return told or parameters.takes_anything or parameters.asks_kwargs or not parameters.parameters


def inspect_file(cls: type) -> str:
    forward = getattr(cls, "forward", None)
    code = getattr(forward, "__code__", None)
    return code.co_filename if code is not None else "<frozen"


def _by_name(found: Named) -> Any:
    value: Any = found.module
    for part in found.name.split("."):
        value = getattr(value, part, None)
    if value is None or isinstance(value, Stub):
        there = ", ".join(_candidates(found)) or "no model"
        why = f" ({value._why})" if isinstance(value, Stub) else ""
        raise UsageError(f"{found.shown} has no {found.name}{why}; it has {there}")
    if not callable(value):
        raise UsageError(
            f"{found.shown}:{found.name} is {type(value).__name__}: expected a class, a factory or a model"
        )
    return value


def _candidates(found: Named) -> list[str]:
    scope = found.scope
    return [k for k, v in scope.items() if _is_model_class(v) or (inspect.isfunction(v) and _is_factory(k, v, found))]


def _is_model_class(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module) and value is not nn.Module


def _is_plain_model(value: Any, found: Named) -> bool:
    """A class without nn.Module that can be called and is built from sizes: a model in NumPy."""
    if not inspect.isclass(value) or value.__module__ != found.module.__name__:
        return False
    sizes = {size for p in signature_of(value).parameters if (size := vocabulary.size_of(p.name))} - {"dropout"}
    return any("__call__" in vars(cls) for cls in value.__mro__[:-1]) and len(sizes) >= 2


def _is_factory(name: str, function: Callable, found: Named) -> bool:
    """A function that makes a model: by its name, or by three sizes among its parameters and a class's name."""
    if function.__module__ != found.module.__name__:
        return False
    if name in FACTORIES or (name.startswith(("build_", "make_", "create_")) and name.endswith(KINDS)):
        return True
    parameters = inspect.signature(function).parameters
    sizes = {size for p in parameters if (size := vocabulary.size_of(p))} - {"dropout"}
    return name[0].isupper() and len(sizes) >= 3


def _tops(found: Named, classes: list[type]) -> list[type]:
    """Classes that no other class of the module uses: not blocks, heads and norms."""
    if len(classes) < 2:
        return classes
    mine = {cls.__name__ for cls in classes}
    used: set[str] = set()
    for source in found.sandbox.sources.values():
        for node in source.body:
            if isinstance(node, ast.ClassDef) and node.name in mine:
                used |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {node.name}
                used |= {name for name in mine - {node.name} for wanted in _wanted(node) if is_called(name, wanted)}
    tops = [cls for cls in classes if cls.__name__ not in used]
    return sorted(tops or classes, key=lambda cls: -_likeness(cls))


def _wanted(node: ast.ClassDef) -> set[str]:
    """The parameters of a class's constructor."""
    makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return {a.arg for maker in makers for a in maker.args.args[1:]}


def _likeness(cls: type) -> int:
    """How much a class looks like a whole language model: by its name and by its constructor."""
    name = cls.__name__.lower()
    words = ("lm", "gpt", "llama", "languagemodel", "causal", "transformer", "model")
    parts = ("block", "layer", "attention", "feedforward", "embedding", "norm", "head", "mlp")
    return sum(word in name for word in words) - 2 * any(part in name for part in parts)


def main_file(value: Any) -> str:
    """The source file that defines an object's class, or the function itself."""
    target = value if inspect.isclass(value) or inspect.isfunction(value) else type(value)
    module = sys.modules.get(target.__module__)
    return getattr(module, "__file__", None) or ""
