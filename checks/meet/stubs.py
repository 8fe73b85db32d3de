"""Placeholders for libraries that user code imports and that are not installed.

Most such imports are for training, logging or data, and the model never uses them. With a placeholder the definitions
can be made; a model that computes with one gets an error that names the library.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch


class MissingLibrary(ImportError):
    """The model computes with something that could not be imported."""


class LeftOut(ImportError):
    """The model computes with a value of its own files whose line was not run."""


NOT_RUN = "its line was not run"


class _Open(type):
    """For classes that derive from a placeholder: what they would inherit is a placeholder too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(f"{cls.__name__}.{name}", "its base class could not be imported")


class Derived(metaclass=_Open):
    """Stands for a base class that could not be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class Logged(torch.nn.Module):
    """Stands for a LightningModule: keeps the constructor's arguments as `hparams`; what is logged is dropped."""

    def save_hyperparameters(self, *named: Any, **options: Any) -> None:
        frame = inspect.currentframe()
        given = inspect.getargvalues(frame.f_back) if frame and frame.f_back else None
        values = {name: given.locals[name] for name in given.args[1:]} if given else {}
        self.hparams = Hyperparameters(values)

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_dict = log


class Hyperparameters(dict[str, Any]):
    """Settings read by key or by name."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Stub:
    """Can be imported from, called, subclassed, used as decorator or annotation; not computed with."""

    def __init__(self, name: str, why: str) -> None:
        self.__dict__.update(_name=name, _why=why, __name__=name.rpartition(".")[2], __path__=[], __spec__=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Stub(f"{self._name}.{name}", self._why)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator it changes nothing; as a progress bar it returns what it was given."""
        if len(args) == 1 and not kwargs and (callable(args[0]) and not isinstance(args[0], torch.nn.Module)):
            return args[0]
        if len(args) >= 1 and self.__name__ in ("tqdm", "trange", "track"):
            return range(*args) if self.__name__ == "trange" else args[0]
        return Stub(f"{self._name}(…)", self._why)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """As a base class: a module if its name says so (LightningModule), else an empty class."""
        module = "Module" in self.__name__ and not any(base is torch.nn.Module for base in bases)
        return (Logged,) if module else (Derived,)

    def __getitem__(self, item: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def __repr__(self) -> str:
        return f"<{self._name}, which could not be imported>"

    def __bool__(self) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: Any) -> bool:
        return self is other

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return next(a for a in _flat((args, kwargs or {})) if isinstance(a, Stub))._refuse()

    def _refuse(self, *args: Any) -> NoReturn:
        if self._why.startswith(NOT_RUN):
            raise LeftOut(f"the model uses {self._name}: {self._why}")
        library = self._name.partition(".")[0].partition("(")[0]
        raise MissingLibrary(
            f"the model uses {self._name}, which could not be imported ({self._why}): install {library} "
            "(the name on PyPI may differ)"
        )

    __iter__ = __len__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = __matmul__ = _refuse
    __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in _flat(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _flat(item)]
    return [value]


def stub_for(module: str, name: str, error: BaseException) -> Stub:
    """What an import that failed binds in place of `module` or of `name` from it."""
    full = f"{module}.{name}" if name else module
    return Stub(full, f"{type(error).__name__}: {error}")


def left_out(module: str, name: str, file: str) -> Stub:
    """What an import binds for a name of a user's file of which only the definitions were run."""
    return Stub(f"{module}.{name}", f"{NOT_RUN} in {file}")
