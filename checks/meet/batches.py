"""What makes batches in a user's file: get_batch in its usual forms, a Dataset, a collate function, a DataLoader.

Each is asked for one batch, of a stream of ids that all differ where it takes its data as an argument. Nothing here
judges: by how many places the targets are shifted is read off by comparing them with the tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import vocabulary
from .roles import NAMES
from .sandbox import Sandbox
from .vocabulary import MISSING, squash

MAKES_BATCHES = re.compile(r"(^|_)(get|make|next|sample|draw|fetch|random|create)_?(\w*_)?(mini)?batch(es)?(_|$)")
COLLATES = re.compile(r"(^|_)collate")
ROWS, PLACES, IDS = 4, 8, 4096  # of a batch, of a row, of the stream
SHIFTS = range(-3, 4)  # that are told apart
LEAST = 8  # targets that must agree, and none of them by chance: the ids of a stream differ
MOST_NAMES = 8  # globals that a function may miss

STREAM = vocabulary.words(
    "data tokens ids stream corpus dataset source arr array text txt tokenids traindata valdata testdata trainids "
    "inputids encoded encodedtext sequence tokenized tokenizedtext trainset x raw content"
)
ROWS_NAMES = vocabulary.words("batchsize bs b n nbatch bsz minibatchsize size")
PLACES_NAMES = vocabulary.words("t ctx context window length") | vocabulary.CONTEXT
SPLITS = vocabulary.words("split mode phase which subset part name")
FORMS: tuple[Callable[[], Any], ...] = (  # of the stream
    lambda: stream(),
    lambda: stream().tolist(),
    lambda: stream().numpy(),
    lambda: "".join(chr(0x4E00 + i) for i in stream().tolist()),
)


def stream() -> Tensor:
    """[IDS], every id once, in a fixed random order."""
    return torch.randperm(IDS, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Batch:
    """Tokens [B, T] and targets [B, T], as something of the user's made them."""

    maker: str  # its name
    tokens: Tensor
    targets: Tensor
    file: str = ""
    line: int = 0

    @property
    def shift(self) -> int | None:
        """The only s with targets[:, t] = tokens[:, t + s] wherever both are known; None if there is none."""
        T = self.tokens.shape[1]
        found = []
        for s in SHIFTS:
            first, last = max(0, -s), min(T, T - s)
            targets, tokens = self.targets[:, first:last], self.tokens[:, first + s : last + s]
            known = targets >= 0  # -100 and -1 are no ids
            if int(known.sum()) >= LEAST and torch.equal(targets[known], tokens[known]):
                found.append(s)
        return found[0] if len(found) == 1 else None


class Character:
    """A tokenizer that gives the place of each character of a text in Unicode."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(character) for character in text]

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": self.encode(text)}


def batches_in(scope: Mapping[str, Any], module: str, sandbox: Sandbox) -> list[Batch]:
    """One batch of everything in this module that makes batches and can be asked for one."""
    found = []
    for name, value in list(scope.items()):
        for draw in _draws(name, value, module):
            with contextlib.suppress(Exception), sandbox, torch.random.fork_rng(devices=[]), _no_files():
                torch.manual_seed(0)
                if (pair := _pair(draw())) is not None:
                    found.append(Batch(name, *pair, *_place(value)))
                    break
    return found


def makes(name: str, value: Any, module: str) -> bool:
    """Whether this looks like what makes batches."""
    return next(_draws(name, value, module), None) is not None


def _place(value: Any) -> tuple[str, int]:
    """The file and line of its code."""
    function = value if inspect.isfunction(value) else getattr(value, "__getitem__", None)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return (code.co_filename, code.co_firstlineno) if code is not None else ("", 0)


# -- asking


def _draws(name: str, value: Any, module: str) -> Iterator[Callable[[], Any]]:
    """The ways to ask this for a batch; none if it makes no batches."""
    own = getattr(value, "__module__", None) == module
    if inspect.isfunction(value) and own and COLLATES.search(name.lower()):
        yield from (partial(_collated, value, of) for of in (_tensors, _lists, _named))
    elif inspect.isfunction(value) and own and MAKES_BATCHES.search(name.lower()):
        yield from (partial(_called, value, form, value.__globals__) for form in FORMS)
    elif inspect.isclass(value) and own and _gives_items(value):
        yield from (partial(_from_dataset, value, form) for form in FORMS)
    elif isinstance(value, DataLoader) and value.num_workers == 0:
        yield lambda: next(iter(value))
    elif isinstance(value, Dataset):
        yield lambda: _items(value)


def _collated(collate: Callable[..., Any], examples: Callable[[], list[Any]]) -> Any:
    return collate(examples())


def _from_dataset(kind: Callable[..., Any], form: Callable[[], Any]) -> list[Any]:
    return _items(_called(kind, form, {}, Character()))


def _gives_items(kind: type) -> bool:
    return not issubclass(kind, nn.Module) and "__getitem__" in vars(kind) and "__len__" in vars(kind)


def _items(dataset: Any) -> list[Any]:
    return [dataset[i] for i in islice(range(len(dataset)), ROWS)]


def _tensors() -> list[Tensor]:
    return list(stream()[: ROWS * PLACES].view(ROWS, PLACES))


def _lists() -> list[list[int]]:
    return [row.tolist() for row in _tensors()]


def _named() -> list[dict[str, Any]]:
    return [{"input_ids": row} for row in _tensors()]


def _called(function: Callable[..., Any], form: Callable[[], Any], names: dict[str, Any], tokenizer: Any = None) -> Any:
    """The function's result. Globals that it misses are given to it as its arguments are, by their names."""
    given = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = _value(parameter.name, form, tokenizer)
        if parameter.default is parameter.empty and value is MISSING:
            raise TypeError(f"no value for {parameter.name}")
        if parameter.default is parameter.empty or (parameter.default is None and value is not MISSING):
            given[parameter.name] = value
    lent: dict[str, Any] = {}
    for _ in range(MOST_NAMES):
        try:
            with patch.dict(names, lent):
                return function(**given)
        except NameError as error:
            missed = error.name or ""
            value = _value(missed, form, tokenizer)
            if value is MISSING or missed in lent:
                raise
            lent[missed] = value
    raise NameError(f"{function} misses more than {MOST_NAMES} names")


def _value(name: str, form: Callable[[], Any], tokenizer: Any) -> Any:
    plain = squash(name)
    if plain in SPLITS:
        return "train"
    if plain in ROWS_NAMES:
        return ROWS
    if plain in PLACES_NAMES or plain == "stride":
        return PLACES
    if plain in NAMES["device"]:
        return "cpu"
    if plain in ("generator", "rng"):
        return torch.Generator().manual_seed(0)
    if plain in ("tokenizer", "enc", "encoder", "tok"):
        return tokenizer if tokenizer is not None else MISSING
    if plain in ("config", "cfg", "args"):
        sizes = {
            "batch_size": ROWS,
            "block_size": PLACES,
            "context_length": PLACES,
            "seq_len": PLACES,
            "max_len": PLACES,
        }
        return SimpleNamespace(**sizes, device="cpu")
    return form() if plain in STREAM else MISSING


@contextlib.contextmanager
def _no_files() -> Iterator[None]:
    """A file of token ids that is read anew for each batch is not there: the stream stands for it."""
    ids = stream().numpy().astype(np.uint16)
    with contextlib.ExitStack() as stack:
        for reads in ("memmap", "fromfile"):
            stack.enter_context(patch.object(np, reads, lambda *args, **options: ids))
        yield


# -- reading


def _pair(made: Any) -> tuple[Tensor, Tensor] | None:
    """Tokens and targets [B, T] in a batch, or in a list of examples; None for anything else."""
    if isinstance(made, Iterator):
        made = next(made)
    if isinstance(made, list) and len(made) > 2:  # examples of a dataset
        pairs = [pair for example in made if (pair := _pair(example)) is not None]
        if len(pairs) < len(made) or len({pair[0].shape for pair in pairs}) > 1:
            return None
        return torch.cat([tokens for tokens, _ in pairs]), torch.cat([targets for _, targets in pairs])
    if not isinstance(made, tuple | list):
        fields = made if isinstance(made, Mapping) else getattr(made, "__dict__", {})
        roles = ("tokens", "targets")
        made = [next((fields[k] for k in fields if squash(str(k)) in NAMES[role]), None) for role in roles]
    tokens, targets = (_ids(value) for value in made[:2])
    if tokens is None or targets is None or tokens.shape != targets.shape:
        return None
    return tokens, targets


def _ids(value: Any) -> Tensor | None:
    """Integers [B, T]; a row alone counts as a batch of one."""
    if isinstance(value, np.ndarray) or (isinstance(value, list) and value and isinstance(value[0], int | list)):
        with contextlib.suppress(Exception):
            value = torch.as_tensor(np.asarray(value).astype(np.int64))
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return None
    value = value.detach().cpu().long()
    return value[None] if value.dim() == 1 else value if value.dim() == 2 else None
