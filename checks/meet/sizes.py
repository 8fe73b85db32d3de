"""The sizes of a built model, by its configuration, its embedding tables and its repeated modules."""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import vocabulary

POSITIONS = re.compile(r"(^|\.|_)(w?pe|pos|positions?|positional|posemb|pos_?enc)(_|\.|$)")
HOLDERS = ("config", "cfg", "args", "params", "hparams", "model_args", "conf")


def sizes_of(model: nn.Module) -> dict[str, int | None]:
    """The sizes that can be found out; None for those that cannot."""
    found: dict[str, int | None] = dict.fromkeys(vocabulary.SIZES[:5])
    for name, value in _declared(model):
        size = vocabulary.size_of(name)
        if size in found and found[size] is None and value > 0:
            found[size] = value
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if tables:
        token = tables[0]
        found["vocab_size"] = found["vocab_size"] or token.num_embeddings
        found["n_embd"] = token.embedding_dim
    positions = _position_rows(model, tables)
    if positions is not None:
        found["block_size"] = positions if found["block_size"] is None else min(found["block_size"], positions)
    found["n_layer"] = _repeated(model) or found["n_layer"]
    return found


def longest_input(model: nn.Module, most: int, device: Any) -> int | None:
    """The most tokens that a plain forward reads; None if it reads `most`, or not even two."""

    def reads(T: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.zeros(1, T, dtype=torch.long, device=device))
        except Exception:  # whatever a foreign forward raises
            return False
        return True

    if reads(most) or not reads(2):
        return None
    return bisect.bisect_left(range(3, most), True, key=lambda T: not reads(T)) + 2


def _declared(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Named integers: of the configuration that the model keeps, then of the model itself and its parts."""
    for holder in (*(getattr(model, name, None) for name in HOLDERS), model, *list(model.modules())[1:]):
        values = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        for name, value in list(values.items()):
            if isinstance(value, int) and not isinstance(value, bool):
                yield str(name), value


def _position_rows(model: nn.Module, tables: list[nn.Embedding]) -> int | None:
    """The rows of a position table: a second embedding of the same width, or a parameter or buffer named like one."""
    if not tables:
        return None
    width, rows = tables[0].embedding_dim, tables[0].num_embeddings
    for name, module in model.named_modules():
        other = isinstance(module, nn.Embedding) and module is not tables[0] and module.embedding_dim == width
        if other and (_for_positions(name) or module.num_embeddings != rows):
            return int(module.num_embeddings)
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.dim() in (2, 3) and _for_positions(name) and tensor.shape[-1] == width:
            found = [n for n in tensor.shape[:-1] if n > 1]
            if len(found) == 1:
                return int(found[0])
    return None


def _for_positions(name: str) -> bool:
    return POSITIONS.search(name.rpartition(".")[2].lower()) is not None


def _repeated(model: nn.Module) -> int | None:
    """The length of the longest list of modules of one class."""
    lengths = []
    for module in model.modules():
        children = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and children:
            cls, count = Counter(type(c) for c in children).most_common(1)[0]
            if count > 1 and any(True for _ in children[0].parameters()) and not issubclass(cls, nn.Linear):
                lengths.append(count)
    return lengths[0] if lengths else None


def head_place(model: nn.Module, width: int) -> str:
    """` (head is a Linear to 50257)`, the module that makes logits of that width; "" if none does."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.out_features == width:
            return f" ({name} is a Linear to {width})"
    return ""


LARGE = 2**18  # numbers
BY_ITSELF = {"_parameters", "_buffers", "_modules", "training"}  # restored in ways of their own


class Restored:
    """Puts one model back to what it was at each call: parts, attributes (a rate, a patched forward), weights, buffers.

    It is the same object each time: a copy might share what it should not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at_rest = False  # nothing was done to it since it was last put back
        self.modes = [(module, module.training) for module in model.modules()]
        self.attributes = [(m, _plain(m)) for m in model.modules()]
        self.parts = [(m, dict(m._modules), dict(m._parameters)) for m in model.modules()]  # checks take blocks out
        tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
        self.kept = {name: (t.detach().clone(), t.requires_grad) for name, t in tensors}
        self.places = {name: t.data_ptr() for name, t in tensors}

    def __call__(self) -> nn.Module:
        if self.at_rest:
            self.at_rest = False
            return self.model
        for module, modules, parameters in self.parts:
            _put_back(module._modules, modules)
            _put_back(module._parameters, parameters)
        for module, attributes in self.attributes:
            for name in _plain(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        tensors: list[tuple[str, Any]] = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in tensors:
            if name in self.kept:
                before, gradient = self.kept[name]
                if before.numel() >= LARGE and self.places[name] == tensor.data_ptr() and _alike(tensor, before):
                    tensor.data.copy_(before)  # new memory would have to be mapped first
                else:
                    tensor.data = before.clone()
                    self.places[name] = tensor.data_ptr()
                tensor.grad = None
                if tensor.is_leaf:
                    tensor.requires_grad_(gradient)
        return self.model

    def leave(self) -> None:
        """Restores it for good, the training mode of each module included."""
        if self.at_rest:
            return
        self()
        for module, training in self.modes:
            module.training = training
        self.at_rest = True


def _alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether values of the other can be copied over."""
    kinds = ((t.shape, t.stride(), t.dtype, t.device) for t in (tensor, other))
    return next(kinds) == next(kinds)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in BY_ITSELF}


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    if [(name, id(held)) for name, held in now.items()] != [(name, id(held)) for name, held in before.items()]:
        now.clear()
        now.update(before)
