"""The configuration of a model: its class, one in another file, a dictionary, or one made of the settings it reads."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from . import vocabulary
from .arguments import CONFIG_NAMES, Filling, Parameter, Settings, signature_of
from .sandbox import OUR_FOLDERS, Sandbox

LIKE_A_CONFIG = ("config", "args", "params", "hyper", "setting", "options", "cfg")


@dataclass(frozen=True)
class Option:
    """One way to get a configuration: its name in the header, and how it is made."""

    says: str
    make: Callable[[Filling], Any]


def options(
    parameter: Parameter, target: Callable[..., Any], scope: Mapping[str, Any], sandbox: Sandbox
) -> Iterator[Option]:
    """The ways to make a value for a parameter like `config`, the surest first."""
    for cls in _own_classes(parameter, target, scope, sandbox):
        yield Option(cls.__name__, functools.partial(make, cls, scope))
    if (default := getattr(target, "get_default_config", None)) is not None:
        yield Option("get_default_config()", functools.partial(_adapted, default))
    for name, value in list(scope.items()):
        if isinstance(value, dict) and sized(value) >= 2:
            yield Option(name, functools.partial(Settings, base=value))
        elif not name.startswith("_") and not isinstance(value, nn.Module) and sized(_plain_vars(value)) >= 2:
            yield Option(name, functools.partial(Settings, base=_plain_vars(value)))
    for literal in _dictionaries(sandbox, scope):
        yield Option("a dictionary", functools.partial(Settings, base=literal))
    read, elsewhere = reads_of(sandbox).read, _classes_elsewhere(sandbox)
    elsewhere.sort(key=lambda cls: (-len(read & _fields(cls)), not _affinity(cls, target), cls.__name__))
    for cls in elsewhere:
        if read <= _fields(cls):
            yield Option(cls.__name__, functools.partial(make, cls, scope))
    yield Option("a configuration with the settings that the code reads", Settings)
    for cls in elsewhere:
        yield Option(cls.__name__, functools.partial(make, cls, scope))


def _own_classes(
    parameter: Parameter, target: Callable[..., Any], scope: Mapping[str, Any], sandbox: Sandbox
) -> list[type]:
    """Configuration classes named by the annotation, by the model's class or in its module."""
    named = [resolve(parameter.kind, scope), getattr(target, "config_class", None)]
    first = [cls for cls in named if inspect.isclass(cls) and is_config(cls)]
    found = {v for v in scope.values() if inspect.isclass(v) and is_config(v) and sandbox.owns(_file(v))}
    rest = sorted(found, key=lambda cls: (not _affinity(cls, target), -sized(_fields(cls)), cls.__name__))
    return list(dict.fromkeys([*first, *rest]))


def _classes_elsewhere(sandbox: Sandbox) -> list[type]:
    """Configuration classes in other files of the project whose names end like config."""
    modules = list(_beside(sandbox))
    return list({cls for module in modules for cls in vars(module).values() if inspect.isclass(cls) and is_config(cls)})


def _affinity(cls: type, target: Callable[..., Any]) -> bool:
    """Whether a configuration class goes with a model by name, as GPTConfig with GPT."""
    name = cls.__name__.lower().replace("config", "").replace("args", "")
    return bool(name) and name in target.__name__.lower()


def _beside(sandbox: Sandbox) -> Iterator[ModuleType]:
    """Imports the modules near the file whose names end like config."""
    if sandbox.file is None:
        return
    for root in dict.fromkeys((sandbox.file.parent, *sandbox.near, *sandbox.far)):
        for path in sorted(
            (*root.glob("*.py"), *root.glob("*/*.py")) if root != sandbox.file.parent else root.glob("*.py")
        ):
            ours = str(path.resolve()).startswith(OUR_FOLDERS)  # a project may lie in our checkout
            if not ours and path.stem.lower().endswith(("config", "configs", "conf", "configuration", "args")):
                before = set(sandbox.sources)
                with contextlib.suppress(Exception):
                    yield importlib.import_module(sandbox.dotted(path, root))
                sandbox.looked_into |= set(sandbox.sources) - before


def _file(cls: type) -> str:
    own = [value for value in vars(cls).values() if getattr(value, "__module__", cls.__module__) == cls.__module__]
    for value in own:  # what a NamedTuple gets from the library is not
        code = getattr(inspect.unwrap(value) if inspect.isfunction(value) else value, "__code__", None)
        if code is not None and not code.co_filename.startswith("<"):
            return str(code.co_filename)
    return "" if cls.__module__ == "builtins" else getattr(inspect.getmodule(cls), "__file__", None) or "subject"


def resolve(kind: Any, scope: Mapping[str, Any]) -> type | None:
    """The class behind an annotation: that of a string or of `Optional[X]`; for `dict[str, X]` it is dict."""
    if isinstance(kind, str):
        try:
            kind = eval(kind, dict(scope))
        except Exception:
            return None
    origin = typing.get_origin(kind)
    if origin is not None and inspect.isclass(origin) and origin is not types.UnionType:
        return origin
    if origin is not None:
        kind = next((a for a in typing.get_args(kind) if inspect.isclass(a) and a is not type(None)), None)
    return kind if inspect.isclass(kind) else None


def is_config(cls: type) -> bool:
    if issubclass(cls, nn.Module | BaseException) or cls.__module__ in ("builtins", "typing"):
        return False
    named = any(word in cls.__name__.lower() for word in LIKE_A_CONFIG)
    if named or ((dataclasses.is_dataclass(cls) or hasattr(cls, "model_fields")) and sized(_fields(cls)) >= 2):
        return True
    needs_nothing = "__init__" in vars(cls) and all(p.default is not vocabulary.MISSING for p in _parameters(cls))
    return (
        needs_nothing and sized(_kept(cls)) >= 3 and not {"forward", "__call__", "__len__", "__iter__"} & set(dir(cls))
    )


def _fields(cls: type) -> set[str]:
    declared = {n for c in cls.__mro__[:-1] for n in (*vars(c), *vars(c).get("__annotations__", ()))}
    return {p.name for p in _parameters(cls)} | declared | _kept(cls)


def _parameters(cls: type) -> tuple[Parameter, ...]:
    with contextlib.suppress(TypeError, ValueError):
        return signature_of(cls).parameters
    return ()


def _kept(cls: type) -> set[str]:
    """The attributes that the constructor mentions, which are mostly those that it sets."""
    code = getattr(vars(cls).get("__init__"), "__code__", None)
    return set() if code is None or code.co_filename.startswith("<") else {*code.co_names}


def sized(given: Iterable[str]) -> int:
    """How many different sizes the names stand for."""
    return len({size for name in given if isinstance(name, str) and (size := vocabulary.size_of(name))} - {"dropout"})


def _plain_vars(value: Any) -> dict[str, Any]:
    if inspect.isclass(value) or inspect.ismodule(value) or inspect.isroutine(value):
        return {}
    return {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")}


def make(cls: type, scope: Mapping[str, Any], filling: Filling) -> Any:
    """An instance of a configuration class, nested configurations included."""
    signature = signature_of(cls)
    nested = {
        p.name: kind for p in signature.parameters
        if (kind := resolve(p.kind, scope)) is not None and is_config(kind) and kind is not cls and sized(_fields(kind))
    }  # fmt: skip
    before = len(filling.missing)
    given = filling.arguments(signature)
    del filling.missing[before:]  # if a required field has no value, the class itself says so
    given.update({name: make(kind, scope, filling) for name, kind in nested.items()})
    config = cls(**given)
    if not given or signature.takes_anything:  # it takes no sizes by name, but perhaps a file or a dictionary
        _set_sizes(config, filling, done=given)
    return config


def _adapted(default: Callable[[], Any], filling: Filling) -> Any:
    return _set_sizes(default(), filling)


def _set_sizes(config: Any, filling: Filling, done: Iterable[str] = ()) -> Any:
    """Overwrites the sizes among the attributes of a configuration made without them."""
    attributes = {**{k: v for c in type(config).__mro__[:-1] for k, v in vars(c).items()}, **_plain_vars(config)}
    known = {k: v for k, v in attributes.items() if not k.startswith("_") and not callable(v)}
    wanted = {**dict.fromkeys(sorted(filling.spelled)), **known}
    for name, default in wanted.items():
        if name in done or isinstance(default, property):
            continue
        value = filling.value(Parameter(name, default), wanted)
        if value is not vocabulary.MISSING:
            with contextlib.suppress(AttributeError, TypeError):
                setattr(config, name, value)
    return config


# -- what the code reads from its configuration


@dataclass(frozen=True)
class Reads:
    """The settings that the user's code reads from its configuration, and how."""

    read: frozenset[str]  # every setting that the model's own file reads
    spelled: frozenset[str]  # those in all files that are sizes: `config.n_layer`, `self.cfg["n_layer"]`
    from_kwargs: frozenset[str]  # `kwargs.get("n_layer")`
    optional: frozenset[str]  # `getattr(config, "use_moe", False)`, `hasattr(config, "use_moe")`
    nested: frozenset[str]  # `config["attention"]["heads"]`, `config.attention.heads`
    choices: dict[str, list[str]]  # strings that a setting is compared with: `if config.model_type == "gpt"`


def reads_of(sandbox: Sandbox) -> Reads:
    read: set[str] = set()
    mine: set[str] = set()
    from_kwargs: set[str] = set()
    optional: set[str] = set()
    nested: set[str] = set()
    choices: dict[str, list[str]] = {}
    called = configurations(sandbox)
    ordered = sorted(sandbox.sources.items(), key=lambda item: item[0] != sandbox.main)  # the model's own file first
    for name, source in ordered:
        scope = vars(sandbox.modules_now().get(name, vocabulary))
        for node in sorted(source.nodes, key=lambda node: getattr(node, "lineno", 0)):
            nested |= _inner(node, called)
            if isinstance(node, ast.Attribute) and _is_config(node.value, called):
                read.add(node.attr)
            elif (key := key_of(node)) is not None and _is_config(key[0], called):
                read.add(key[1])
                from_kwargs |= {key[1]} if isinstance(key[0], ast.Name) and key[0].id.endswith("kwargs") else set()
            elif isinstance(node, ast.Call) and (name_read := _read_softly(node, called)):
                optional.add(name_read)
            elif isinstance(node, ast.Compare) and (choice := _choice(node, scope)) is not None:
                choices.setdefault(choice[0], []).append(choice[1])
        mine |= read if name == sandbox.main else set()
    known = frozenset(
        name for name in read
        if vocabulary.size_of(name) or {vocabulary.squash(name)} & {*choices, *vocabulary.KEY_VALUE_HEADS}
    )  # fmt: skip
    return Reads(
        frozenset(mine), known, known & from_kwargs, frozenset(optional), frozenset(nested - optional), choices
    )


def _inner(node: ast.AST, called: frozenset[str]) -> set[str]:
    """The key of a configuration whose value is itself read by keys: a nested configuration."""
    if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Constant | ast.Slice):
        return _table(node.value, called)  # config["presets"][name]
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        return _table(node.comparators[0], called)
    outer = node.value if isinstance(node, ast.Attribute) else key[0] if (key := key_of(node)) is not None else None
    if isinstance(outer, ast.Attribute) and _is_config(outer.value, called):
        return {outer.attr} if key_of(node) is not None or node.attr not in METHODS else set()  # type: ignore[attr-defined]
    inner = key_of(outer) if outer is not None else None
    return {inner[1]} if inner is not None and _is_config(inner[0], called) and key_of(node) is not None else set()


def _table(node: ast.expr, called: frozenset[str]) -> set[str]:
    key = key_of(node)
    return {key[1]} if key is not None and _is_config(key[0], called) else set()


METHODS = frozenset(dir(str)) | frozenset(dir(dict)) | {"type", "dtype", "shape", "append"}


def _read_softly(node: ast.Call, called: frozenset[str]) -> str:
    """The setting in `getattr(config, "x", …)` or `hasattr(config, "x")`; "" for any other call."""
    soft = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr") and len(node.args) > 1
    if not soft or not _is_config(node.args[0], called):
        return ""
    return str(node.args[1].value) if isinstance(node.args[1], ast.Constant) else ""


def key_of(node: ast.AST) -> tuple[ast.expr, str] | None:
    """`x["key"]`, `x.get("key")`, `x.pop("key")`."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.value, node.slice.value
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "pop")
        and node.args
    ):
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return node.func.value, first.value
    return None


def _choice(node: ast.Compare, scope: Mapping[str, Any]) -> tuple[str, str] | None:
    """A setting and the first string that it is compared with: `x == "a"`, `x in ("a", "b")`, `x in TABLE`."""
    left, right = node.left, node.comparators[0]
    name = left.id if isinstance(left, ast.Name) else left.attr if isinstance(left, ast.Attribute) else ""
    if not name or not isinstance(node.ops[0], ast.Eq | ast.In):
        return None
    within = isinstance(node.ops[0], ast.In)
    value: Any = _evaluate(right, scope) if within or isinstance(right, ast.Constant) else None
    if within and not isinstance(value, str) and value is not vocabulary.MISSING:
        try:
            value = next(iter(value), None)
        except TypeError:
            return None
    return (vocabulary.squash(name), value) if isinstance(value, str) and value != "__main__" else None


def configurations(sandbox: Sandbox) -> frozenset[str]:
    """What constructors call an argument of which they read two or more sizes: `s.hidden`, `s["layers"]`."""
    found = set()
    for node in (node for source in sandbox.sources.values() for node in source.nodes):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            read: dict[str, set[str]] = {argument.arg: set() for argument in node.args.args[1:]}
            for inner in ast.walk(node):
                key = (inner.value, inner.attr) if isinstance(inner, ast.Attribute) else key_of(inner)
                if key is not None and isinstance(key[0], ast.Name) and key[0].id in read:
                    read[key[0].id].add(key[1])
            found |= {name for name, keys in read.items() if sized(keys) >= 2}
    return frozenset(found)


def _is_config(node: ast.expr, called: frozenset[str]) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    plain = vocabulary.squash(name)
    return name in called or plain in CONFIG_NAMES or plain == "kwargs" or plain.endswith(("config", "cfg"))


def _dictionaries(sandbox: Sandbox, scope: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Dictionary literals with sizes as keys, wherever they are: example configurations in `main()`."""
    known = {**scope, "args": SimpleNamespace(**_command_line(sandbox))}
    for source in sandbox.sources.values():
        for node in source.nodes:
            if isinstance(node, ast.Dict):
                keys = [str(key.value) if isinstance(key, ast.Constant) else "" for key in node.keys]
                found = {key: _evaluate(value, known) for key, value in zip(keys, node.values, strict=True)}
                if sized(keys) >= 3:
                    yield {k: v for k, v in found.items() if k and v is not vocabulary.MISSING}


def _command_line(sandbox: Sandbox) -> dict[str, Any]:
    """Defaults of the command-line options that the user's files define."""
    found = {}
    for source in sandbox.sources.values():
        for statement in source.body:
            for node in ast.walk(statement):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr == "add_argument"
                ):
                    flag = next((a.value for a in node.args if isinstance(a, ast.Constant)), None)
                    default = next((k.value for k in node.keywords if k.arg == "default"), None)
                    if isinstance(flag, str) and default is not None:
                        found[flag.lstrip("-").replace("-", "_")] = _evaluate(default, {})
    return found


def _evaluate(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    try:
        return eval(compile(ast.Expression(node), "<setting>", "eval"), dict(scope))
    except Exception:
        return vocabulary.MISSING
