"""Finds the model that `FILE.py[:NAME]`, `NOTEBOOK.ipynb[:NAME]` or `package.module:NAME` names.

Without NAME it is the one model of the file: its factory, class or instance.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
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
COURSE = "load_model_and_tokenizer"  # (folder) -> model, tokenizer, as a course asks for it
KINDS = ("model", "transformer", "gpt", "llama", "lm")
FORMS = "FILE.py[:NAME], NOTEBOOK.ipynb[:NAME] or package.module:NAME"


@dataclass(frozen=True)
class Found:
    """A module that was loaded, and the name wanted from it ("" for its one model)."""

    sandbox: Sandbox
    module: ModuleType
    name: str
    shown: str  # model.py, package.module

    @property
    def scope(self) -> dict[str, Any]:
        return vars(self.module)


def find(spec: str) -> Found:
    """Loads the module that `spec` names. Raises UsageError if there is none or it cannot be loaded."""
    path, name = split(spec)
    if path is not None:
        return _from_file(path, name)
    module, _, name = spec.partition(":")
    file = _source_of(module, spec)
    if file is not None and not installed(str(file)):
        return _from_file(file, name, as_module=module)
    sandbox = Sandbox()
    return Found(sandbox, load_module(sandbox, module), name, module)


def split(spec: str) -> tuple[Path | None, str]:
    """A file and a name; no file for `package.module[:NAME]`. File names may contain colons themselves."""
    colons = [i for i, letter in enumerate(spec) if letter == ":"]
    splits = [(spec, ""), *((spec[:i], spec[i + 1 :]) for i in reversed(colons))]
    for path, name in splits:
        if path.endswith(SUFFIXES) and os.path.isfile(path):
            return Path(path).resolve(), name
    path, name = next(((p, n) for p, n in splits if p.endswith(SUFFIXES)), ("", ""))
    if path or os.sep in spec:
        where = path or spec
        if os.path.isdir(where):
            raise UsageError(f"{where} is a folder; expected {FORMS}")
        raise UsageError(f"no file {where} (the working directory is {os.getcwd()}); expected {FORMS}")
    return None, ""


def _source_of(module: str, spec: str) -> Path | None:
    if not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"{spec!r} does not name a model: expected {FORMS}")
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
        raise UsageError(f"no module {module!r} in the working directory or installed; expected {FORMS}")
    return Path(found.origin) if found.origin and found.origin.endswith(".py") else None


def _from_file(file: Path, name: str, as_module: str = "") -> Found:
    sandbox = sandbox_of(file)
    module = load_file(sandbox, file, (name,) if name else ())
    return Found(sandbox, module, name, as_module or shown(str(file)))


def sandbox_of(file: Path) -> Sandbox:
    root, dotted = (file.parent, file.stem) if file.suffix == ".ipynb" else package_of(file)
    sandbox = Sandbox(file, root, SubjectLoader)
    sandbox.main = dotted
    return sandbox


# -- the model in a module


def candidates(found: Found) -> list[Any]:
    """What can be the model, the likeliest first: what NAME names, or the file's factory, classes and instances."""
    if found.name:
        return [_by_name(found)]
    scope = {k: v for k, v in found.scope.items() if not k.startswith("_") and not isinstance(v, Stub)}
    if callable(scope.get("build_model")):
        return [scope["build_model"]]
    classes = _tops(found, [v for v in scope.values() if _is_model_class(v) and v.__module__ == found.module.__name__])
    factories = [v for k, v in scope.items() if inspect.isfunction(v) and _is_factory(k, v, found)]
    instances = [v for v in scope.values() if isinstance(v, nn.Module)]
    arrays = [v for v in scope.values() if _is_plain_model(v, found)]
    others = [v for v in scope.values() if _is_model_class(v) and found.sandbox.owns(_file_of_forward(v))]
    models = classes or instances or _tops(found, others) or _tops(found, arrays)
    if not models and not factories and callable(scope.get(COURSE)):
        return [scope[COURSE]]
    if classes:  # create_model(preset="tiny") has sizes of its own: prefer its class, which may take any
        factories = [function for function in factories if _takes_sizes(function)]
    return list(dict.fromkeys([*factories, *models]))


def fallbacks(found: Found, tried: list[Any]) -> list[Any]:
    """What to try if none of the candidates worked: factories that take no sizes, classes that other classes use."""
    own = [(k, v) for k, v in found.scope.items() if getattr(v, "__module__", "") == found.module.__name__]
    factories = [v for k, v in own if inspect.isfunction(v) and _is_factory(k, v, found)]
    classes = sorted((v for _, v in own if _is_model_class(v)), key=lambda cls: -_likeness(cls))
    return [] if found.name else [left for left in (*factories, *classes) if left not in tried]


def _takes_sizes(function: Callable[..., Any]) -> bool:
    """Whether a factory takes sizes: one by one, in a configuration, or through `**kwargs`."""
    parameters = signature_of(function)
    told = any(vocabulary.size_of(p.name, required=True) or p.is_config for p in parameters.parameters)
    return told or parameters.takes_anything or parameters.asks_kwargs or not parameters.parameters


def _file_of_forward(cls: type) -> str:
    forward = getattr(cls, "forward", None)
    code = getattr(forward, "__code__", None)
    return code.co_filename if code is not None else "<frozen"


def _by_name(found: Found) -> Any:
    value: Any = found.module
    for part in found.name.split("."):
        value = getattr(value, part, None)
    if value is None or isinstance(value, Stub):
        there = ", ".join(_model_names(found)) or "no model"
        why = f" ({value._why})" if isinstance(value, Stub) else ""
        raise UsageError(f"{found.shown} has no {found.name}{why}; it has {there}")
    if not callable(value):
        raise UsageError(
            f"{found.shown}:{found.name} is a {type(value).__name__}, expected a class, a factory or a model"
        )
    return value


def _model_names(found: Found) -> list[str]:
    scope = found.scope
    return [k for k, v in scope.items() if _is_model_class(v) or (inspect.isfunction(v) and _is_factory(k, v, found))]


def _is_model_class(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module) and value is not nn.Module


def _is_plain_model(value: Any, found: Found) -> bool:
    """Whether it is a class without nn.Module that can be called and takes sizes: a model in NumPy."""
    if not inspect.isclass(value) or value.__module__ != found.module.__name__:
        return False
    sizes = {size for p in signature_of(value).parameters if (size := vocabulary.size_of(p.name))} - {"dropout"}
    return any("__call__" in vars(cls) for cls in value.__mro__[:-1]) and len(sizes) >= 2


def _is_factory(name: str, function: Callable[..., Any], found: Found) -> bool:
    """Whether a function makes a model: by its name, or if it is named like a class and takes three sizes."""
    if function.__module__ != found.module.__name__:
        return False
    if name in FACTORIES or (name.startswith(("build_", "make_", "create_")) and name.endswith(KINDS)):
        return True
    parameters = inspect.signature(function).parameters
    sizes = {size for p in parameters if (size := vocabulary.size_of(p))} - {"dropout"}
    return name[0].isupper() and len(sizes) >= 3


def _tops(found: Found, classes: list[type]) -> list[type]:
    """The classes that no other class of the module uses: models, not blocks, heads and norms."""
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
