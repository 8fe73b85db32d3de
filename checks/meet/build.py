"""`Recipe`: one way to build a model from sizes with a class or factory; `recipes`: all ways, the surest first."""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from types import ModuleType
from typing import Any
from weakref import ref

import torch
from torch import nn

from . import configs, vocabulary
from .arguments import (
    CONFIG_NAMES,
    Filling,
    Parameter,
    Settings,
    Signature,
    head_width,
    heads,
    is_called,
    signature_of,
    spare,
    width,
)
from .configs import Option
from .definitions import pure
from .passed_on import passed_on
from .sandbox import Sandbox
from .source import Source
from .stubs import Stub

# Variants to try if a constructor refuses the first arguments: another of the strings that it compares a setting with;
# no preset beside the sizes.
NO_PRESET = {"modeltype": None, "preset": None, "version": None, "modelname": None}
# None by default but needed: the base of rotary positions, an id for padding.
NEEDED = dict.fromkeys(("ropetheta", "theta", "ropebase"), 10_000.0) | dict.fromkeys(vocabulary.PADDING, spare)
# Beside another name for the width these are usually the feed-forward width, but sometimes the width again.
TWICE = dict.fromkeys(vocabulary.HIDDEN, width)
# Latent attention has keys for every head; experts may be None by default and needed, and come in groups.
LATENT = dict.fromkeys(vocabulary.KEY_VALUE_HEADS, heads) | {
    "nroutedexperts": 8, "numroutedexperts": 8, "nsharedexperts": 1, "numexpertspertok": 2, "ngroup": 2, "topkgroup": 1,
    "moeintermediatesize": width, "qlorarank": width, "kvlorarank": width,
    "qknopeheaddim": head_width, "qkropeheaddim": head_width,
}  # fmt: skip
HEADS = LATENT | dict.fromkeys(vocabulary.HEAD_WIDTH, head_width)
VARIANTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}), (0, NO_PRESET), (0, NEEDED), (0, TWICE), (0, LATENT), (0, HEADS), (0, HEADS | NEEDED),
)  # fmt: skip
INITIALIZERS = ("init_weights", "initialize_weights", "reset_parameters", "initialize", "init_parameters")


class Unfillable(Exception):
    """A constructor needs values that were not found: `missing` names the parameters."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__(f"no value found for {', '.join(missing)}")
        self.missing = missing


class NotAModel(TypeError):
    """What was built cannot be called on tokens."""


@dataclass
class Recipe:
    """One way to build a model from sizes."""

    target: Callable[..., Any]
    says: str  # GPTConfig(vocab_size, block_size), once built
    sandbox: Sandbox
    causal: bool
    options: dict[str, Option]  # for each parameter that is a configuration
    special: Mapping[str, Any] = field(default_factory=dict)
    choice: int = 0
    options_asked: Mapping[str, Any] = field(default_factory=dict)
    varies: dict[str, str] = field(default_factory=dict)  # parameter -> size
    assumed: dict[str, Any] = field(default_factory=dict)
    offered: dict[str, Any] = field(default_factory=dict)  # parameter -> its value, of what was built last
    places: dict[str, str] = field(default_factory=dict)  # settings found in the project's files -> the file
    _sizes: dict[int, tuple[ref[nn.Module], dict[str, Any]]] = field(
        default_factory=dict
    )  # of the models built, by their id
    _globals: dict[str, Any] = field(default_factory=dict)
    _reads_globals: bool = False

    def build(self, sizes: Mapping[str, Any]) -> nn.Module:
        """A fresh model. Raises Unfillable, NotAModel, or what the user's code raises."""
        filling = self.filling(sizes)
        self.varies, self.assumed, self.offered = filling.used, filling.assumed, filling.offered
        with self.sandbox:
            self.set_globals(sizes, filling)
            model = as_module(self._call(filling), self.sandbox)
            self._initialize(model)
        self._sizes = {key: known for key, known in self._sizes.items() if known[0]() is not None}
        self._sizes[id(model)] = ref(model), dict(sizes)  # by id: a model may define equality as it likes
        return model

    @functools.cached_property
    def reads(self) -> configs.Reads:
        return configs.reads_of(self.sandbox)

    def with_options(self, options: Mapping[str, Any]) -> Recipe:
        """The same way with other values for some parameters that are no sizes."""
        other = replace(self, options_asked=options)
        other.__dict__["reads"] = self.reads
        return other

    def filling(self, sizes: Mapping[str, Any]) -> Filling:
        reads = self.reads
        return Filling(
            sizes, self.causal, reads.spelled, reads.from_kwargs, reads.choices, self.choice, self._elsewhere,
            reads.optional, reads.nested, self.special,
            self.options_asked,
        )  # fmt: skip

    def _elsewhere(self, name: str) -> Any:
        given = self.sandbox.project.given(name)
        if given is None:
            return vocabulary.MISSING
        self.places[name] = given[1]
        return given[0]

    def sizes_of(self, model: nn.Module) -> Mapping[str, Any] | None:
        """The sizes that a model was built with; None for a model that was not built here, such as a copy."""
        known = self._sizes.get(id(model))
        return known[1] if known is not None and known[0]() is model else None

    def set_globals_for(self, model: nn.Module) -> None:
        """If sizes are globals, sets them to those that the model was built with."""
        sizes = self.sizes_of(model)
        if self._reads_globals and sizes is not None and sizes != self._globals:
            with self.sandbox:
                self.set_globals(sizes)

    def _call(self, filling: Filling) -> Any:
        scope = self.scope
        mine = signature = resolved(signature_of(self.target), scope)
        if signature.takes_anything:
            further = (p for p in passed_on(self.target, scope, self.sandbox) if p.name not in signature)
            signature = resolved(replace(signature, parameters=(*signature.parameters, *further)), scope)
        given = {}
        for parameter in signature.parameters:
            if parameter.name in self.options:
                given[parameter.name] = config = self.options[parameter.name].make(filling)
                self._share(config)
        rest = replace(
            signature,
            parameters=tuple(p for p in signature.parameters if p.name not in given),
            takes_anything=signature.takes_anything and not given,
        )
        given |= filling.arguments(rest)
        _complete(rest, filling, given, scope)
        required = [p.name for p in mine.parameters if p.default is vocabulary.MISSING and p.name not in given]
        if required:
            raise Unfillable(required)
        return _apply(self.target, given)

    def _share(self, config: Any) -> None:
        """Sets globals that should hold the configuration: code may read it there instead of from its argument."""
        for name, module in self.sandbox.modules_now().items():
            for free in self.sandbox.sources[name].free_names if name in self.sandbox.sources else ():
                if vocabulary.squash(free) in CONFIG_NAMES and not hasattr(module, free):
                    setattr(module, free, config)
                    self.sandbox.remark(f"{free} is not defined in {name}: the model's own configuration is used")
                elif type(vars(module).get(free)) is type(config):
                    setattr(module, free, config)

    @property
    def scope(self) -> Mapping[str, Any]:
        return scope_of(self.target, self.sandbox)

    def set_globals(self, sizes: Mapping[str, Any], filling: Filling | None = None) -> None:
        """Sets the sizes that the user's functions read as globals, and what is computed from them."""
        if self.sandbox.file is None:
            return
        for name, module in list(self.sandbox.modules_now().items()):
            source = self.sandbox.sources.get(name)
            if source is not None:
                changed = _set_globals_of(module, source, sizes, filling or self.filling(sizes))
                self._reads_globals |= bool(changed)
        self._globals = dict(sizes)

    def _initialize(self, model: nn.Module) -> None:
        """Calls the class's own initializer if its constructor does not; moves weights off the meta device."""
        name = next((n for n in INITIALIZERS if _by_hand(type(model), n, self.sandbox)), None)
        on_meta = [m for m in model.modules() if any(x.is_meta for x in (*m.parameters(False), *m.buffers(False)))]
        for module in on_meta:  # weights that have values keep them
            module.to_empty(device="cpu", recurse=False)
        if name is None and on_meta:
            raise NotAModel("its weights are on the meta device, and there is no init_weights() to give them values")
        if name is not None:
            getattr(model, name)()
            self.sandbox.remark(f"{name}() is called after construction")


def _by_hand(cls: type, name: str, sandbox: Sandbox) -> bool:
    """Whether a user's class has an initializer without arguments that its constructor never calls."""
    method = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
    if not inspect.isfunction(method) or not sandbox.owns(method.__code__.co_filename):
        return False
    required = [p for p in list(inspect.signature(method).parameters.values())[1:] if p.default is p.empty]
    makers = [vars(c)["__init__"] for c in cls.__mro__ if inspect.isfunction(vars(c).get("__init__"))]
    return not required and not any(name in _names_in(maker.__code__) for maker in makers)


def _names_in(code: Any) -> set[str]:
    inner = [c for c in code.co_consts if inspect.iscode(c)]
    return {*code.co_names, *(n for c in inner for n in _names_in(c))}


def _apply(target: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Calls with keywords, and by position where the signature allows nothing else."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return target(**given)
    positional = [p.name for p in parameters.values() if p.kind == p.POSITIONAL_ONLY]
    named = {k: v for k, v in given.items() if k not in positional}
    return target(*(given[name] for name in positional if name in given), **named)


def resolved(signature: Signature, scope: Mapping[str, Any]) -> Signature:
    """The same signature with string annotations replaced by the classes that they name."""
    parameters = (replace(p, kind=configs.resolve(p.kind, scope) or p.kind) for p in signature.parameters)
    return replace(signature, parameters=tuple(parameters))


def _complete(
    signature: Signature, filling: Filling, given: dict[str, Any], scope: Mapping[str, Any], depth: int = 2
) -> None:
    """Adds what is not a size: parts of the model, which are built, and values found in the project's files."""
    for wanted in (p for p in signature.parameters if p.name in filling.missing):
        value = _part(wanted, filling, scope, depth) if depth else None
        if value is None and (value := filling.from_project(wanted)) is vocabulary.MISSING:
            continue
        given[wanted.name] = value
        filling.missing.remove(wanted.name)


def _part(parameter: Parameter, filling: Filling, scope: Mapping[str, Any], depth: int) -> Any:
    """A required argument that is not a number: a placeholder tokenizer, or a module of a class in the file."""
    plain = vocabulary.squash(parameter.name)
    if "token" in plain and plain.endswith(("izer", "ize")):
        return Settings(filling)
    for cls in _classes_of(parameter, filling, scope):
        with contextlib.suppress(Exception):
            inner = replace(filling, used={}, assumed={}, missing=[])
            signature = resolved(signature_of(cls), scope)
            given = inner.arguments(signature)
            _complete(signature, inner, given, scope, depth - 1)
            part = _apply(cls, given)
            filling.used.update(inner.used)
            filling.assumed.update({**inner.assumed, parameter.name: f"{cls.__name__}(…)"})
            return part
    return None


def _classes_of(parameter: Parameter, filling: Filling, scope: Mapping[str, Any]) -> list[type]:
    """The classes that fit a parameter by annotation or name: for `encoder`, Encoder and TransformerEncoder."""
    kind = configs.resolve(parameter.kind, scope)
    classes: list[Any] = [v for v in scope.values() if inspect.isclass(v) and v is not nn.Module]
    if kind is not None and issubclass(kind, nn.Module) and kind is not nn.Module:
        mine = [cls for cls in classes if issubclass(cls, kind)]
        return sorted(mine, key=lambda c: (not (filling.causal and "decoder" in c.__name__.lower()), c is not kind))
    if kind not in (None, nn.Module):
        return []
    called = [cls for cls in classes if is_called(cls.__name__, parameter.name) and hasattr(cls, "forward")]
    return sorted(called, key=lambda cls: len(cls.__name__))


def scope_of(target: Callable[..., Any], sandbox: Sandbox) -> Mapping[str, Any]:
    """The names that the target's own module sees."""
    module = sandbox.modules_now().get(target.__module__) or inspect.getmodule(target)
    return vars(module) if module is not None else getattr(target, "__globals__", {})


def recipes(target: Callable[..., Any], sandbox: Sandbox, causal: bool) -> Iterator[Recipe]:
    """The ways to build with `target`, the surest first: each choice of configuration, then each variant."""
    with sandbox:
        signature, scope = signature_of(target), scope_of(target, sandbox)
        called = configs.configurations(sandbox)
        wants = [p for p in signature.parameters if wants_config(p, scope, called)]
    found: list[dict[str, Option]] = []
    for options in _configurations(wants, target, scope, sandbox):
        found.append(options)
        yield Recipe(target, "", sandbox, causal, options)
    if signature.parameters or signature.takes_anything:
        for choice, special in VARIANTS:
            yield from (Recipe(target, "", sandbox, causal, options, special, choice) for options in found)


def _configurations(
    wants: list[Parameter], target: Callable[..., Any], scope: Mapping[str, Any], sandbox: Sandbox
) -> Iterator[dict[str, Option]]:
    """An option for each parameter that is a configuration. For a single one, options are looked for only as needed."""
    if len(wants) != 1:
        with sandbox:
            choices = [list(configs.options(p, target, scope, sandbox)) for p in wants]
        yield from ({p.name: o for p, o in zip(wants, chosen, strict=True)} for chosen in product(*choices))
        return
    options = configs.options(wants[0], target, scope, sandbox)
    while True:
        with sandbox:
            option = next(options, None)
        if option is None:
            return
        yield {wants[0].name: option}


def wants_config(parameter: Parameter, scope: Mapping[str, Any], called: frozenset[str]) -> bool:
    kind = configs.resolve(parameter.kind, scope)
    if kind is not None and issubclass(kind, nn.Module | str | int | float):
        return False
    annotated = kind is not None and configs.is_config(kind)
    named = parameter.is_config or parameter.name in called
    given = parameter.default is not vocabulary.MISSING and parameter.default is not None
    if given and not annotated and not named:
        return False
    return annotated or (named and not isinstance(parameter.default, str | int | float))


class FunctionModule(nn.Module):
    """A plain function or object that gives logits, as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_module(built: Any, sandbox: Sandbox) -> nn.Module:
    """The model in what a class or factory returned."""
    if isinstance(built, nn.Module):
        return built
    if isinstance(built, tuple | list):
        for item in built:
            if isinstance(item, nn.Module):
                sandbox.remark(
                    f"the factory returns {len(built)} values: the {type(item).__name__} is taken as the model"
                )
                return item
    if callable(built) and not inspect.isclass(built):
        return FunctionModule(built)
    raise NotAModel(f"expected a model, got {type(built).__name__}, which is neither an nn.Module nor callable")


# -- sizes as globals


def _set_globals_of(module: ModuleType, source: Source, sizes: Mapping[str, Any], filling: Filling) -> set[str]:
    """Sets the globals that the module's functions read and that are named like sizes; returns their names."""
    scope = vars(module)
    changed: set[str] = set()
    for name in source.free_names:
        if hasattr(builtins, name):
            continue
        current = scope.get(name, vocabulary.MISSING)
        if isinstance(current, dict):
            changed |= _set_table(name, current, filling)
        if not _can_be_set(current):
            continue
        value = _of_global(name, current, filling)
        if value is vocabulary.MISSING and current is vocabulary.MISSING and name in source.guarded:
            value = source.guarded[name]
        if value is not vocabulary.MISSING:
            scope[name] = value
            changed.add(name)
    for statement in source.body if changed else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target = statement.targets[0].id
            read = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
            if target not in changed and read & changed and pure(statement.value):
                with contextlib.suppress(Exception):
                    code = compile(ast.Expression(statement.value), "<global>", "eval", dont_inherit=True)
                    scope[target] = eval(code, scope)
                    changed.add(target)
    return changed


def _of_global(name: str, current: Any, filling: Filling) -> Any:
    if current is not vocabulary.MISSING:
        return filling.value(Parameter(name, current), ())
    if vocabulary.size_of(name):
        return filling.value(Parameter(name, None), ())
    if vocabulary.squash(name) in vocabulary.NUMBERS:
        return vocabulary.value_for(name, filling.sizes)
    return vocabulary.MISSING


def _set_table(name: str, table: dict[Any, Any], filling: Filling) -> set[str]:
    """Sets the sizes inside a table of presets, `{"small": dict(n_layer=12, …)}`."""
    rows = [row for row in table.values() if isinstance(row, dict) and configs.sized(row) >= 2]
    for row in rows:
        for key, default in row.items():
            value = filling.value(Parameter(str(key), default), row)
            row[key] = default if value is vocabulary.MISSING else value
    return {name} if rows else set()


def _can_be_set(value: Any) -> bool:
    if value is vocabulary.MISSING or isinstance(value, Stub | torch.device):
        return True
    return isinstance(value, int | float | str) and not isinstance(value, bool)
