"""A plan: which part of the reference each weight of the subject is, and how it is laid out.

`Plan.state` turns the subject's weights into those of the reference. planning.py makes plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .inventory import Inventory, Weight

Value = Callable[[Weight], Tensor | None]


class NoPlan(ValueError):
    """The weights are neither a GPT-2's nor a Llama's; the message says which of them do not fit."""


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocab_size: int
    block_size: int
    n_head: int
    n_embd: int

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Norm:
    """Gain and bias of a norm: places in a layer's list of weights, or the weights themselves outside the layers."""

    gain: Any
    bias: Any = None
    minus_one: bool = False  # the gain is stored minus one


@dataclass(frozen=True)
class Matrix:
    """A projection: the places of its matrix and bias in a layer's list of weights."""

    at: int
    bias: int | None
    out: int
    into: int


@dataclass(frozen=True)
class Plan:
    """How the subject's weights become the reference's."""

    inventory: Inventory
    shape: Shape
    n_kv_head: int
    embedding: Weight
    positions: Weight | None
    head: Weight
    head_bias: Weight | None
    final_norm: Norm | None
    attention_norm: Norm | None
    feed_forward_norm: Norm | None
    form: str  # "fused", "split", "query and pair", "per head"
    attention: tuple[Matrix, ...]
    output: Matrix
    feed_forward: tuple[Matrix, ...]  # input; or gate, input; or both in one
    feed_forward_output: Matrix
    # How queries, keys and values are laid out: "qkv|h3d" is the order of the letters and of the axes (3, heads,
    # features) in a fused matrix; "vqk|dh" the order of three matrices and of the axes in each.
    arrangement: str = ""
    gate_first: bool = True
    gated: bool = False
    unplaced: tuple[Weight, ...] = field(default=())  # weights that are no part of the reference
    from_table: bool = False  # the user's table says which matrix is which

    @property
    def tied(self) -> bool:
        return self.head is self.embedding

    @property
    def query_first(self) -> bool:
        """With one matrix for queries and one for keys and values: whether the first is for queries."""
        return self.attention[0].out == self.shape.n_head * self.shape.head_width

    @property
    def hidden(self) -> int:
        return self.feed_forward_output.into

    def state(self, value: Value) -> dict[str, Tensor]:
        """`value` of the subject's weights, by the names of `Transformer.state_dict`; without those that it lacks."""
        found: dict[str, Tensor | None] = {
            "embedding.weight": _table(value(self.embedding), self.shape.n_embd),
            "head.weight": _table(value(self.head), self.shape.n_embd),
            "head.bias": value(self.head_bias) if self.head_bias else None,
        }
        if self.positions is not None:
            table = value(self.positions)
            found["positions.table.weight"] = None if table is None else table.reshape(-1, self.shape.n_embd)
        found |= _norm("norm", self.final_norm, lambda place: value(place))
        for index, layer in enumerate(self.inventory.layers):
            found |= self._block(f"blocks.{index}.", _places(layer, value))
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _block(self, prefix: str, get: Callable[[int], Tensor | None]) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        found |= _norm(prefix + "attention_norm", self.attention_norm, get)
        found |= _norm(prefix + "feed_forward_norm", self.feed_forward_norm, get)
        for kind in ("weight", "bias"):
            projected = [self._get(m, kind, get) for m in self.attention]
            present = [p for p in projected if p is not None]
            if len(present) == len(projected):
                found[prefix + f"attention.qkv.{kind}"] = self._queries_keys_values(present)
            elif present:
                filled = [torch.zeros(m.out, 1).to(self.embedding.tensor) if p is None else p
                          for m, p in zip(self.attention, projected, strict=True)]  # fmt: skip
                found[prefix + f"attention.qkv.{kind}"] = self._queries_keys_values(filled)
            found[prefix + f"attention.output.{kind}"] = self._merged(
                self._get(self.output, kind, get, output=True), kind
            )
            inside = [self._get(m, kind, get) for m in self.feed_forward]
            names = ("gate", "input") if self.gated else ("input",)
            if self.gated and len(inside) == 1 and inside[0] is not None:
                inside = list(inside[0].chunk(2))
                names = names if self.gate_first else names[::-1]
            for name, tensor in zip(names, inside, strict=False):
                found[prefix + f"feed_forward.{name}.{kind}"] = tensor
            found[prefix + f"feed_forward.output.{kind}"] = self._get(self.feed_forward_output, kind, get, output=True)
        return {name: t if t is None or name.endswith("weight") else t.flatten() for name, t in found.items()}

    def _get(self, m: Matrix, kind: str, get: Callable[[int], Tensor | None], *, output: bool = False) -> Tensor | None:
        """[out, in] for a matrix, [out, 1] for a bias."""
        if kind == "bias":
            bias = None if m.bias is None else get(m.bias)
            return None if bias is None else bias.reshape(-1, 1)
        tensor, weight = get(m.at), self.inventory.layers[0][m.at]
        return None if tensor is None else _matrix(tensor, weight, m, self.shape, output)

    def _queries_keys_values(self, parts: list[Tensor]) -> Tensor:
        H, G, D = self.shape.n_head, self.n_kv_head, self.shape.head_width
        last = parts[0].shape[-1]
        if self.form == "fused":
            return _untangle(parts[0], self.arrangement, H, G, D)
        if self.form == "query and pair":
            first = 0 if self.query_first else 1
            pair = _untangle(parts[1 - first], self.arrangement, 0, G, D)
            return torch.cat((_heads(parts[first], self.arrangement, D), pair))
        if self.form == "per head":
            order = [self.arrangement.index(letter) for letter in "qkv"]
            return torch.cat([torch.cat(parts[o::3]).reshape(-1, last) for o in order])
        by_letter = dict(zip(self.arrangement[:3], parts, strict=True))
        return torch.cat([_heads(by_letter[letter], self.arrangement, D) for letter in "qkv"])

    def _merged(self, output: Tensor | None, kind: str) -> Tensor | None:
        """The output projection with its columns in the order (head, feature)."""
        if output is None or kind == "bias" or not self.arrangement.endswith("dh"):
            return output
        H, D = self.shape.n_head, self.shape.head_width
        return output.view(-1, D, H).transpose(1, 2).reshape(-1, H * D)


def _places(layer: list[Weight], value: Value) -> Callable[[int], Tensor | None]:
    """A function from a place in the layer to the `value` of the weight there."""
    return lambda place: value(layer[place])


def _heads(x: Tensor, arrangement: str, D: int) -> Tensor:
    """The rows in the order (head, feature)."""
    if not arrangement.endswith("dh"):
        return x
    return x.view(D, -1, x.shape[-1]).transpose(0, 1).reshape(x.shape)


def _untangle(x: Tensor, arrangement: str, H: int, G: int, D: int) -> Tensor:
    """Sorts rows laid out as `arrangement` into all queries, then keys, then values. H is 0 if there are no queries."""
    letters, layout = arrangement.split("|")
    last = x.shape[-1]
    letters = letters if H else letters.replace("q", "")
    if layout == "grouped":  # each key-value head follows the query heads that read it
        groups = x.view(G, -1, D, last)
        parts = dict(k=groups[:, -2], v=groups[:, -1])
        if H:
            parts["q"] = groups[:, :-2]
    elif H in (0, G):
        sizes = {"3": len(letters), "h": G, "d": D}
        cube = x.view(*(sizes[axis] for axis in layout), last)
        cube = cube.permute(*(layout.index(axis) for axis in "3hd"), 3)
        parts = dict(zip(letters, cube, strict=True))
    else:
        heads = dict(q=H, k=G, v=G)
        parts = dict(zip(letters, torch.split(x, [heads[letter] * D for letter in letters]), strict=True))
    return torch.cat([parts[letter].reshape(-1, last) for letter in "qkv" if letter in parts])


def _table(t: Tensor | None, width: int) -> Tensor | None:
    if t is None or t.dim() != 2:
        return t
    return t if t.shape[1] == width else t.T


def _norm(name: str, norm: Norm | None, get: Callable[[Any], Tensor | None]) -> dict[str, Tensor | None]:
    if norm is None:
        return {}
    found: dict[str, Tensor | None] = {}
    if norm.gain is not None:
        gain = get(norm.gain)
        found[f"{name}.weight"] = None if gain is None else gain.flatten()
    if norm.bias is not None:
        bias = get(norm.bias)
        found[f"{name}.bias"] = None if bias is None else bias.flatten()
    return found


def _matrix(t: Tensor, weight: Weight, m: Matrix, shape: Shape, output: bool) -> Tensor:
    if t.dim() == 3 and t.shape[-1] == 1 and weight.by == "conv1d":
        return t.squeeze(-1)
    if t.dim() > 2:  # an axis for heads, perhaps one for queries, keys and values
        C = shape.n_embd
        axis = tuple(t.shape).index(C)
        return t.movedim(axis, 0).reshape(C, -1) if output else t.movedim(axis, -1).reshape(-1, C)
    return t if t.shape == (m.out, m.into) and not (weight.input_first and m.out == m.into) else t.T
