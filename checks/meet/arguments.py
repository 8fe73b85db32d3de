"""Arguments for a constructor from the sizes wanted: by parameter names, annotations and defaults."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import vocabulary
from .vocabulary import MISSING

CONFIG_NAMES = vocabulary.words(
    "config cfg conf args params hparams hps modelargs modelconfig opt options settings configuration c gptconfig "
    "mconf modelparams hyperparams hyperparameters modelcfg hparam argument arguments configs gptconf"
)


def spare(sizes: Mapping[str, Any]) -> Any:
    """An id that no check uses."""
    return sizes.get("padding")


def width(sizes: Mapping[str, Any]) -> Any:
    return sizes["n_embd"]


def heads(sizes: Mapping[str, Any]) -> Any:
    return sizes["n_head"]


def head_width(sizes: Mapping[str, Any]) -> Any:
    return sizes["n_embd"] // sizes["n_head"]


@dataclass(frozen=True)
class Parameter:
    name: str
    default: Any = MISSING
    kind: Any = None  # its annotation

    @property
    def is_config(self) -> bool:
        plain = vocabulary.squash(self.name)
        return plain in CONFIG_NAMES or plain.endswith(("config", "cfg", "args"))

    @property
    def can_be_a_number(self) -> bool:
        """Whether it can be a size, by its default and annotation: a bool, a string or a module cannot."""
        if isinstance(self.default, bool | str | nn.Module | list | tuple | dict) or inspect.isclass(self.default):
            return False
        if inspect.isclass(self.kind):
            return issubclass(self.kind, int | float) and self.kind is not bool
        return self.kind not in ("bool", "str")


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    takes_anything: bool = False  # **kwargs
    asks_kwargs: bool = False  # a constructor among the base classes has **kwargs, which it may read by name

    def __contains__(self, name: str) -> bool:
        return any(p.name == name for p in self.parameters)


def signature_of(target: Callable[..., Any]) -> Signature:
    """The parameters of a class or function, those of base classes included that `**kwargs` passes on."""
    if not inspect.isclass(target):
        return _signature(target, bound=True)
    maker = next((cls for cls in target.__mro__ if "__init__" in vars(cls)), object)
    code = getattr(vars(maker)["__init__"], "__code__", None)
    if "__dataclass_params__" in vars(maker) and code is not None and code.co_filename.startswith("<"):
        return _of_fields(target)  # the constructor was made by @dataclass, not written by hand
    found: dict[str, Parameter] = {}
    asks = False
    for cls in target.__mro__:
        if "__init__" in vars(cls):
            mine = _signature(vars(cls)["__init__"], bound=False)
            found = {**{p.name: p for p in mine.parameters}, **found}
            asks |= mine.takes_anything
            if not mine.takes_anything:
                return Signature(tuple(found.values()), asks_kwargs=asks)
        if cls in (nn.Module, object):
            break
    if (fields := getattr(target, "model_fields", None)) and isinstance(fields, Mapping):  # pydantic
        return Signature(tuple(_of_pydantic(name, value) for name, value in fields.items()))
    try:
        return _signature(target, bound=True) if not found else Signature(tuple(found.values()), True, asks)
    except (TypeError, ValueError):
        return Signature(tuple(found.values()), True, asks)


def _of_fields(target: type) -> Signature:
    parameters = []
    for item in dataclasses.fields(target):
        if item.init:
            default = item.default if item.default is not dataclasses.MISSING else MISSING
            if item.default_factory is not dataclasses.MISSING:
                default = _made(item.default_factory)
            parameters.append(Parameter(item.name, default, item.type))
    return Signature(tuple(parameters))


def _of_pydantic(name: str, item: Any) -> Parameter:
    return Parameter(
        name, MISSING if item.is_required() else item.get_default(call_default_factory=True), item.annotation
    )


def _made(factory: Callable[[], Any]) -> Any:
    try:
        return factory()
    except Exception:
        return None


def _signature(function: Callable[..., Any], *, bound: bool) -> Signature:
    parameters = list(inspect.signature(function).parameters.values())[0 if bound else 1 :]
    named = tuple(
        Parameter(
            p.name,
            MISSING if p.default is p.empty else p.default,
            None if p.annotation is p.empty else p.annotation,
        )
        for p in parameters
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )
    return Signature(named, any(p.kind == p.VAR_KEYWORD for p in parameters))


def is_called(name: str, parameter: str) -> bool:
    """Whether a class has the name of a parameter: Encoder and TransformerEncoder have that of `encoder`."""
    return len(parameter) > 2 and vocabulary.squash(name).endswith(vocabulary.squash(parameter))


@dataclass
class Filling:
    """Gives constructors their arguments, and records sizes used, other values set and parameters without a value."""

    sizes: Mapping[str, Any]
    causal: bool = True
    spelled: frozenset[str] = frozenset()  # configuration keys that the user's code reads
    from_kwargs: frozenset[str] = frozenset()  # those that it reads from **kwargs
    choices: Mapping[str, list[str]] = field(
        default_factory=dict
    )  # strings that the code compares a setting with, by setting
    choice: int = 0  # which of these strings to use
    elsewhere: Callable[[str], Any] = lambda name: MISSING  # what the project's files say
    optional: frozenset[str] = frozenset()  # configuration keys that the code can do without
    nested: frozenset[str] = frozenset()  # configuration keys that are configurations themselves
    special: Mapping[str, Any] = field(default_factory=dict)  # values of the variant being tried, by name
    options: Mapping[str, Any] = field(default_factory=dict)  # values asked for, by name
    used: dict[str, str] = field(default_factory=dict)  # parameter -> the size that it was given
    assumed: dict[str, Any] = field(default_factory=dict)  # parameter -> a value that is not a size
    missing: list[str] = field(default_factory=list)
    offered: dict[str, Any] = field(default_factory=dict)  # parameter -> the value that it has: given, or its default

    def value(self, parameter: Parameter, among: Iterable[str]) -> Any:
        """The value for a parameter; MISSING if its default stays."""
        asked = self.options.get(parameter.name, MISSING)
        value = self._value(parameter, among) if asked is MISSING else asked
        self.offered[parameter.name] = parameter.default if value is MISSING else value
        return value

    def _value(self, parameter: Parameter, among: Iterable[str]) -> Any:
        name, plain = parameter.name, vocabulary.squash(parameter.name)
        if (special := self._special(parameter)) is not MISSING:
            self.assumed[name] = special
            return special
        if (causal := vocabulary.causal(name, parameter.default, parameter.kind)) is not None:
            if not self.causal and parameter.default is not MISSING:
                return MISSING
            wanted = causal is self.causal
            if wanted is not parameter.default:
                self.assumed[name] = wanted
            return wanted
        free = parameter.default is MISSING
        size = vocabulary.size_of(name, among, required=free) if parameter.can_be_a_number else None
        if size is not None and not (
            size == "dropout"
            and isinstance(parameter.default, int)
            and parameter.default is not MISSING
            and parameter.default > 1
        ):
            self.used[name] = size
            return self.sizes[size]
        if size is None and not parameter.can_be_a_number and plain in vocabulary.NUMBERS:
            return MISSING
        value = vocabulary.value_for(name, self.sizes, parameter.default, among=among, kind=parameter.kind)
        if value is MISSING and parameter.default is MISSING:
            value = next(iter(list(dict.fromkeys(self.choices.get(plain, ())))[self.choice :]), MISSING)
        if value is not MISSING and value is not parameter.default:
            self.assumed[name] = value
        return value

    def _special(self, parameter: Parameter) -> Any:
        """The value for the parameter in the variant being tried; MISSING if the variant has none."""
        value, default = self.special.get(vocabulary.squash(parameter.name), MISSING), parameter.default
        if value is MISSING or (default is MISSING and value is not width) or default == value:
            return MISSING
        return value(self.sizes) if callable(value) else value

    def from_project(self, parameter: Parameter, kinds: tuple[type, ...] = (bool, int, float)) -> Any:
        """The value that the project's files give it, if it is of the right type; MISSING otherwise."""
        value = self.elsewhere(parameter.name)
        asked = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(parameter.kind, kinds)
        if not isinstance(value, asked):
            return MISSING
        self.assumed[parameter.name] = value
        return value

    def arguments(self, signature: Signature) -> dict[str, Any]:
        """Keyword arguments for one constructor. A required parameter without a value is noted as missing."""
        parameters = list(signature.parameters)
        spelled = self.spelled if signature.takes_anything else self.from_kwargs if signature.asks_kwargs else ()
        parameters += [Parameter(name) for name in sorted(spelled) if name not in signature]
        among = [p.name for p in parameters]
        given = {}
        for parameter in parameters:
            value = self.value(parameter, among)
            if value is not MISSING:
                given[parameter.name] = value
            elif parameter.default is MISSING and parameter.name in signature:
                self.missing.append(parameter.name)
        return given


class Unset(AttributeError):
    """Code reads a setting, or an attribute of a placeholder tokenizer, for which there is no value."""


class Settings(dict[str, Any]):
    """A configuration that finds a value when code reads a setting: `cfg["n_layer"]` or `cfg.n_layer`."""

    def __init__(self, filling: Filling, base: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        base = dict(base or {})
        self.__dict__["_filling"], self.__dict__["_asked"] = filling, [*filling.spelled, *base]
        layers = next((v for k, v in base.items() if vocabulary.size_of(k) == "n_layer"), None)
        for name, default in base.items():
            if isinstance(default, list) and len(default) == layers:  # one entry per layer
                self[name] = default[-filling.sizes["n_layer"] :]
                continue
            value = filling.value(Parameter(name, default), base)
            self[name] = default if value is MISSING else value

    def __missing__(self, name: str) -> Any:
        filling = self._filling
        value = filling.value(Parameter(name), self._asked)
        if value is MISSING and name in filling.nested:
            value = Settings(filling)
        elif value is MISSING and name not in filling.optional:
            value = filling.from_project(Parameter(name), (bool, int, float, str, type(None)))
        if value is MISSING:
            if name not in filling.missing:
                filling.missing.append(name)
            raise KeyError(name)
        self[name] = value
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError:
            raise Unset(f"no value for the setting {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value
