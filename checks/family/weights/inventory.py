"""All weights of a model, found by identity: each one's shape, owner, layer, and order of use in a forward pass.

Names play no part here, so that unusual ones do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Functions that only ask a tensor about itself, or return the same numbers in another shape. Neither counts as a use.
QUESTIONS = {"__get__", "size", "dim", "numel", "stride", "data_ptr", "__len__", "is_floating_point", "is_contiguous",
             "element_size", "ndimension", "get_device", "__repr__", "__hash__", "untyped_storage"}  # fmt: skip
VIEWS = {"t", "transpose", "permute", "view", "reshape", "contiguous", "expand", "detach", "unsqueeze", "squeeze", "to",
         "type_as", "double", "float", "__getitem__", "chunk", "split", "unbind", "flatten", "swapaxes", "narrow",
         "expand_as", "view_as", "clone", "requires_grad_", "type"}  # fmt: skip

CALL = 100  # the order of a use is the number of the call times this, plus the place among its arguments

# Functions that multiply by a matrix, and whether they take it as [in, out].
USED_INPUT_FIRST = {"linear": False, "matmul": True, "__matmul__": True, "__rmatmul__": True, "mm": True, "addmm": True}


def is_vector(tensor: Tensor) -> bool:
    """Whether at most one axis is longer than 1."""
    return sum(n > 1 for n in tensor.shape) <= 1


@dataclass(eq=False)
class Weight:
    """One tensor of the subject. A tied tensor is one weight with several names."""

    name: str
    tensor: Tensor
    owner: nn.Module
    trained: bool  # a parameter, not a buffer
    start: Tensor  # values at initialization
    names: list[str] = field(default_factory=list)  # more than one if it is tied
    order: int | None = None  # of its first use in a forward pass; None if it is never used
    by: str = ""  # the function that uses it first
    call: int | None = None  # the number of that call: a matrix and its bias share it
    input_first: bool | None = None  # whether a matrix is stored as [in, out]; None where its use does not tell

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    @property
    def is_vector(self) -> bool:
        return is_vector(self.tensor)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass
class Inventory:
    """The weights of a model, by layer."""

    outer: list[Weight]  # those of no layer
    layers: list[list[Weight]]  # the same place in each layer holds the same part
    buffers: list[Weight]

    @property
    def weights(self) -> list[Weight]:
        return list({id(w): w for w in (*self.outer, *(w for layer in self.layers for w in layer))}.values())


def take(model: nn.Module, run: Callable[[], Any], n_layer: int) -> Inventory:
    """The inventory of a freshly initialized model; `run()` is one forward pass of it."""
    weights = _by_identity(model)
    record_use(weights, run)
    trained = {id(w.tensor): w for w in weights if w.trained}
    repeated, inside = _layers(model, n_layer), set()
    layers: list[list[Weight]] = [[] for _ in range(n_layer if repeated else 0)]
    for parts in repeated:
        mine = [[trained[id(p)] for p in part if id(p) in trained] for part in parts]
        for index, part in enumerate(_in_turn(mine)):
            layers[index // (len(parts) // n_layer)] += part
            inside |= {id(w) for w in part}
    outer = [w for w in weights if w.trained and id(w) not in inside]
    return Inventory(_in_order(outer), _aligned(layers), [w for w in weights if not w.trained])


def _by_identity(model: nn.Module) -> list[Weight]:
    found: dict[tuple[object, ...], Weight] = {}
    owners = dict(model.named_modules(remove_duplicate=False))
    for trained, tensors in (
        (True, model.named_parameters(remove_duplicate=False)),
        (False, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            if not tensor.is_floating_point():
                continue
            owner = owners[name.rpartition(".")[0]]
            start = tensor.detach().clone()
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
            key: tuple[object, ...] = place if tensor.numel() else (id(tensor),)
            found.setdefault(key, Weight(name, tensor, owner, trained, start)).names.append(name)
    return list(found.values())


def _layers(module: nn.Module, n_layer: int) -> list[list[list[Tensor]]]:
    """What repeats in every layer: groups of k·n_layer parts with the same shapes.

    A part is the parameters of one module, the outermost that repeats, or one parameter of a ParameterList or
    ParameterDict.
    """
    alone = list(module.parameters(recurse=False)) if isinstance(module, nn.ParameterList | nn.ParameterDict) else []
    everything: list[tuple[nn.Module | None, list[Tensor]]] = [(None, [p]) for p in alone]
    everything += [(child, list(child.parameters())) for child in module._modules.values() if child is not None]
    siblings: dict[tuple[tuple[int, ...], ...], list[tuple[nn.Module | None, list[Tensor]]]] = {}
    for child, parameters in everything:
        siblings.setdefault(tuple(tuple(p.shape) for p in parameters), []).append((child, parameters))
    found = []
    for shapes, parts in siblings.items():
        if shapes and n_layer > 1 and len(parts) % n_layer == 0:
            found.append([parameters for _, parameters in parts])
        else:
            found += [group for child, _ in parts if child is not None for group in _layers(child, n_layer)]
    return found


def _in_turn(parts: list[list[Weight]]) -> list[list[Weight]]:
    """By first use if all are used: a list may hold the query matrices of all layers before all key matrices."""
    firsts = [min((w.order for w in part if w.order is not None), default=-1) for part in parts]
    return parts if -1 in firsts else [parts[index] for index in sorted(range(len(parts)), key=firsts.__getitem__)]


class _Uses(TorchFunctionMode):
    """Records when each weight is first used, and by which function."""

    def __init__(self, weights: list[Weight]) -> None:
        super().__init__()
        self.at = {w.tensor.untyped_storage().data_ptr(): w for w in weights if w.tensor.numel()}
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in QUESTIONS:
            self.calls += 1
            for position, tensor in enumerate(_tensors((args, kwargs))):
                weight = self.at.get(tensor.untyped_storage().data_ptr())
                if weight is not None:
                    self._note(weight, name, position, tensor)
                    if name == "einsum" and isinstance(args[0], str) and weight.input_first is None:
                        weight.input_first = contracts_first(args[0], position)
        return func(*args, **(kwargs or {}))

    def _note(self, weight: Weight, name: str, position: int, used: Tensor) -> None:
        if weight.order is None:
            weight.order = self.calls * CALL + position
        if weight.call is None and name not in VIEWS:
            weight.order, weight.by, weight.call = self.calls * CALL + position, name, self.calls
            if name in USED_INPUT_FIRST and used.dim() == 2:
                flipped = used.stride() != weight.tensor.stride()
                weight.input_first = USED_INPUT_FIRST[name] != flipped


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf


def contracts_first(equation: str, operand: int) -> bool | None:
    """Whether einsum sums a matrix (`mh` in `bpm,mh->bph`) over its first axis; None if not over exactly one."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    axes = inputs.split(",")[operand]
    if len(axes) != 2 or (axes[0] in output) == (axes[1] in output):
        return None
    return axes[0] not in output


def record_use(weights: list[Weight], run: Callable[[], Any]) -> None:
    """Fills in when each weight is used."""
    with torch.no_grad(), _Uses(weights):
        run()


def _in_order(weights: list[Weight]) -> list[Weight]:
    """By first use. An unused weight comes after the call that uses the weight before it."""
    place = 0
    keys = {}
    for weight in weights:
        place = place - place % CALL + CALL - 1 if weight.order is None else weight.order
        keys[id(weight)] = place
    return sorted(weights, key=lambda w: keys[id(w)])


def _aligned(layers: list[list[Weight]]) -> list[list[Weight]]:
    """The weights of every layer in the order in which the first layer uses them."""
    if not layers:
        return []
    order = {id(w): index for index, w in enumerate(layers[0])}
    places = [order[id(w)] for w in _in_order(layers[0])]
    if any(len(layer) != len(places) for layer in layers):
        return layers
    return [[layer[place] for place in places] for layer in layers]
