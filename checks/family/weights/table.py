"""The table of a model's weights: which weight of the reference each one is, by name. It can be printed and read back.

A layer's number is written as `*`: {"h.*.attn.c_attn.weight": "blocks.*.attention.qkv.weight"}. The values are names of
the reference's weights, with queries, keys and values apart or together as in the model.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...meet.errors import UsageError
from ...subject import Spec
from .inventory import Inventory, Weight
from .planning import arranged, plans
from .roles import Matrix, NoPlan, Norm, Plan, Shape

OUTER = ("embedding", "positions.table", "head", "norm")
NORMS = ("attention_norm", "feed_forward_norm")
ATTENTION = {"fused": ("qkv",), "query and pair": ("query", "key_value"), "split": ("query", "key", "value")}
FEED_FORWARD = {"gated": ("gate", "input"), "gated in one": ("gate_and_input",), "plain": ("input",)}
LAYER = (
    *NORMS,
    *(f"attention.{part}" for part in ("query", "key", "value", "key_value", "qkv", "output")),
    *(f"feed_forward.{part}" for part in ("gate", "input", "gate_and_input", "output")),
)
PARTS = (*OUTER, *(f"blocks.*.{part}" for part in LAYER))
OURS = tuple(f"{part}.{kind}" for part in PARTS for kind in ("weight", "bias"))
SPECS = ("auto", "gpt2", "llama")
SPELLED = {"q": "query", "k": "key", "v": "value"}


# -- printing


def shown(plan: Plan) -> dict[str, str]:
    """The plan as a table. A weight that is both embedding and head is listed under each of its names."""
    found = {plan.embedding.name: "embedding.weight"}
    if not plan.tied or len(plan.head.names) > 1:
        found[plan.head.names[-1]] = "head.weight"
    for weight, ours in ((plan.positions, "positions.table.weight"), (plan.head_bias, "head.bias")):
        if weight is not None:
            found[weight.name] = ours
    for place, ours in _norm("norm", plan.final_norm):
        found[place.name] = ours
    layers = plan.inventory.layers
    for places, ours in _in_layers(plan):
        found[pattern([layer[place].name for place in places for layer in layers])] = f"blocks.*.{ours}"
    return found


def _norm(name: str, norm: Norm | None) -> Iterator[tuple[Any, str]]:
    for place, kind in ((norm.gain, "weight"), (norm.bias, "bias")) if norm else ():
        if place is not None:
            yield place, f"{name}.{kind}"


def _in_layers(plan: Plan) -> Iterator[tuple[list[int], str]]:
    """Places in a layer (one per head where every head has its own weight), and the reference's name for them."""
    for name in NORMS:
        for place, ours in _norm(name, getattr(plan, name)):
            yield [place], ours
    named: dict[str, list[Matrix]] = {}
    for name, matrix in (*_attention(plan), ("attention.output", plan.output), *_feed_forward(plan)):
        named.setdefault(name, []).append(matrix)
    for name, matrices in named.items():
        yield [m.at for m in matrices], f"{name}.weight"
        biases = [m.bias for m in matrices if m.bias is not None]
        if biases:
            yield biases, f"{name}.bias"


def _attention(plan: Plan) -> Iterator[tuple[str, Matrix]]:
    if plan.form == "fused":
        names = ["qkv"]
    elif plan.form == "query and pair":
        names = ["query", "key_value"] if plan.query_first else ["key_value", "query"]
    else:
        names = [SPELLED[letter] for letter in plan.arrangement[:3]] * (len(plan.attention) // 3)
    for name, matrix in zip(names, plan.attention, strict=True):
        yield f"attention.{name}", matrix


def _feed_forward(plan: Plan) -> Iterator[tuple[str, Matrix]]:
    names = FEED_FORWARD["plain" if not plan.gated else "gated" if len(plan.feed_forward) == 2 else "gated in one"]
    for name, matrix in zip(names, plan.feed_forward, strict=True):
        yield f"feed_forward.{name}", matrix
    yield "feed_forward.output", plan.feed_forward_output


def pattern(names: list[str]) -> str:
    """`h.*.attn.weight` for h.0.attn.weight, h.1.attn.weight, …; the first name if they differ in more than numbers."""
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(parts) for parts in split}) > 1:
        return names[0]
    columns = [set(column) for column in zip(*split, strict=True)]
    return "".join(next(iter(c)) if len(c) == 1 else "*" for c in columns)


# -- reading


def read(path: str) -> dict[str, str]:
    """The table in a JSON file. Raises UsageError if it is not a table, or names a weight that the reference lacks."""
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(ours, str) for ours in table.values()):
        raise UsageError(f'{path}: expected an object {{"name in your model": "name in the reference", …}}')
    for theirs, ours in table.items():
        if ours not in OURS:
            numbered = re.sub(r"^blocks\.\d+\.", "blocks.*.", ours)
            near = [numbered] if numbered in OURS else difflib.get_close_matches(ours, OURS, n=3)
            near = near or [f"{part}.weight" for part in PARTS]
            raise UsageError(
                f"{path}: the reference has no weight {ours!r} (for {theirs!r}); expected {', '.join(near)}"
            )
    return table


def declared_spec(text: str) -> Spec:
    """What a user declares: `gpt2`, `llama`, `auto`, or a family with a table of weights, `gpt2:FILE.json`.

    Raises UsageError for another family, and for a table that cannot be read.
    """
    family, colon, path = text.partition(":")
    if family not in SPECS or (colon and family == "auto"):
        raise UsageError(f"--spec {text}: expected one of {', '.join(SPECS)}, or gpt2:FILE.json, llama:FILE.json")
    return Spec(family, path, read(path) if colon else {})


def plans_from_table(inventory: Inventory, shape: Shape, table: Mapping[str, str]) -> list[Plan]:
    """The candidate plans that agree with the table, which may be partial. If none does, the table must be complete.

    Raises UsageError for a wrong name or shape, and for missing entries.
    """
    try:
        fits = [plan for plan in plans(inventory, shape) if table.items() <= shown(plan).items()]
    except NoPlan:
        fits = []
    return fits or list(arranged(_CompleteTable(inventory, shape, table).plan()))


class _CompleteTable:
    """Makes a plan of a complete table."""

    def __init__(self, inventory: Inventory, shape: Shape, table: Mapping[str, str]) -> None:
        self.inventory, self.shape = inventory, shape
        self.weights = [*inventory.weights, *inventory.buffers]
        self.outer: dict[str, Weight] = {}
        self.layered: dict[str, dict[int, list[Weight]]] = {}  # by name in the reference and layer, one per head
        for theirs, ours in table.items():
            self._place(theirs, ours)
        self.layers = self._layers()

    def _place(self, theirs: str, ours: str) -> None:
        found = self._called(theirs)
        if not ours.startswith("blocks."):
            self.outer[ours] = found[0][1]
            return
        if "*" not in theirs:
            raise UsageError(f"{theirs!r}: {ours!r}: write * for the layer's number in both names")
        for numbers, weight in found:
            self.layered.setdefault(ours, {}).setdefault(numbers[0], []).append(weight)

    def _called(self, theirs: str) -> list[tuple[tuple[int, ...], Weight]]:
        """The weights that match a name, sorted by the numbers that stand for its `*`."""
        regex = re.compile(re.escape(theirs).replace(r"\*", r"(\d+)"))
        found = [(tuple(map(int, match.groups())), weight)
                 for weight in self.weights for name in weight.names if (match := regex.fullmatch(name))]  # fmt: skip
        if not found:
            known = sorted({re.sub(r"\d+", "*", name) for weight in self.weights for name in weight.names})
            near = difflib.get_close_matches(theirs, known, n=3) or known
            raise UsageError(f"your model has no weight {theirs!r}; did you mean {', '.join(near)}?")
        return sorted(found, key=lambda each: each[0])

    def _layers(self) -> list[list[Weight]]:
        numbers = {ours: sorted(layers) for ours, layers in self.layered.items()}
        if len({tuple(each) for each in numbers.values()}) > 1:
            raise UsageError(f"the table's entries match different layers: {numbers}")
        found = [[w for layers in self.layered.values() for w in layers[n]] for n in next(iter(numbers.values()), [])]
        order = sorted(range(len(found[0])), key=lambda i: found[0][i].order or 0) if found else []
        return [[layer[place] for place in order] for layer in found]

    def plan(self) -> Plan:
        attention = self._which("attention", ATTENTION)
        feed_forward = self._which("feed_forward", FEED_FORWARD)
        self._complain(attention, feed_forward)
        inside = {id(w) for layer in self.layers for w in layer}
        outer = [w for w in self.inventory.weights if id(w) not in inside]
        inventory = Inventory(outer, self.layers, self.inventory.buffers)
        H, D, C = self.shape.n_head, self.shape.head_width, self.shape.n_embd
        rows = sum(w.numel for part in ATTENTION[attention] for w in self._first(f"attention.{part}.weight")) // C
        G = (rows - H * D) // (2 * D)
        if G < 1 or H % G or rows != (H + 2 * G) * D:
            raise UsageError(
                f"queries, keys and values have {rows} rows together; expected {H * D} plus {2 * D} per key-value "
                f"head, with a number of key-value heads that divides {H}"
            )
        hidden = self._first("feed_forward.output.weight")[0].numel // C
        heads = {"query": H, "key": G, "value": G, "key_value": 2 * G, "qkv": H + 2 * G}
        matrices = [self._matrices(f"attention.{p}", heads[p] * D, C) for p in ATTENTION[attention]]
        apart = attention == "split" and len(matrices[0]) > 1
        widths = {"gate": hidden, "input": hidden, "gate_and_input": 2 * hidden}
        plan = Plan(
            inventory, self.shape, G,
            embedding=self._outer("embedding.weight", C), positions=self.outer.get("positions.table.weight"),
            head=self._outer("head.weight", C), head_bias=self.outer.get("head.bias"),
            final_norm=self._outer_norm(),
            attention_norm=self._norm("attention_norm"), feed_forward_norm=self._norm("feed_forward_norm"),
            form="per head" if apart else attention,
            attention=tuple(m for each in zip(*matrices, strict=True) for m in each),
            output=self._matrices("attention.output", C, H * D)[0],
            feed_forward=tuple(self._matrices(f"feed_forward.{p}", widths[p], C)[0]
                               for p in FEED_FORWARD[feed_forward]),
            feed_forward_output=self._matrices("feed_forward.output", C, hidden)[0],
            gated=feed_forward != "plain", from_table=True,
        )  # fmt: skip
        return plan

    def _which(self, sublayer: str, forms: dict[str, tuple[str, ...]]) -> str:
        """The form whose parts are all in the table; the last form if there is none."""
        for form, parts in forms.items():
            if all(f"blocks.*.{sublayer}.{part}.weight" in self.layered for part in parts):
                return form
        return list(forms)[-1]

    def _complain(self, attention: str, feed_forward: str) -> None:
        wanted = [f"blocks.*.attention.{part}.weight" for part in (*ATTENTION[attention], "output")]
        wanted += [f"blocks.*.feed_forward.{part}.weight" for part in (*FEED_FORWARD[feed_forward], "output")]
        missing = [ours for ours in ("embedding.weight", *wanted) if ours not in {*self.layered, *self.outer}]
        if missing:
            taken = {id(w) for layers in self.layered.values() for ws in layers.values() for w in ws}
            taken |= {id(w) for w in self.outer.values()}
            free = sorted({re.sub(r"\d+", "*", w.name) for w in self.weights if id(w) not in taken})
            raise UsageError(
                f"the table has no entry for {', '.join(missing)}; weights without an entry: {', '.join(free)}"
            )

    def _first(self, ours: str) -> list[Weight]:
        """The weights for it in the first layer."""
        return next(iter(self.layered[f"blocks.*.{ours}"].values()))

    def _at(self, ours: str) -> list[int]:
        found = self.layered.get(f"blocks.*.{ours}")
        return [] if found is None else [self._index(w) for w in next(iter(found.values()))]

    def _index(self, weight: Weight) -> int:
        return next(place for place, w in enumerate(self.layers[0]) if w is weight)

    def _matrices(self, name: str, out: int, into: int) -> list[Matrix]:
        """One matrix, or one per head, with the biases."""
        places, biases = self._at(f"{name}.weight"), self._at(f"{name}.bias")
        each = out // len(places)
        for kind, ats, size in (("weight", places, each * into), ("bias", biases, each)):
            for weight in (self.layers[0][at] for at in ats):
                if weight.numel != size or len(ats) != len(places):
                    shape = [each, into] if kind == "weight" else [each]
                    raise UsageError(f"{weight} cannot be blocks.*.{name}.{kind}, expected shape {shape}")
        return [Matrix(at, biases[i] if biases else None, each, into) for i, at in enumerate(places)]

    def _norm(self, name: str) -> Norm | None:
        gain, bias = self._at(f"{name}.weight"), self._at(f"{name}.bias")
        for at in (*gain, *bias):
            self._is_vector(self.layers[0][at], f"blocks.*.{name}")
        if not gain and not bias:
            return None
        zero = bool(gain) and not bias and bool((self.layers[0][gain[0]].start == 0).all())
        return Norm(gain[0] if gain else None, bias[0] if bias else None, minus_one=zero)

    def _outer_norm(self) -> Norm | None:
        gain, bias = self.outer.get("norm.weight"), self.outer.get("norm.bias")
        for weight in (gain, bias):
            if weight is not None:
                self._is_vector(weight, "norm")
        if gain is None and bias is None:
            return None
        return Norm(gain, bias, minus_one=gain is not None and bias is None and bool((gain.start == 0).all()))

    def _is_vector(self, weight: Weight, name: str) -> None:
        if weight.numel != self.shape.n_embd:
            raise UsageError(f"{weight} cannot belong to {name}, expected shape [{self.shape.n_embd}]")

    def _outer(self, ours: str, width: int) -> Weight:
        weight = self.outer.get(ours, self.outer["embedding.weight"])
        if width not in weight.shape or weight.numel // width < self.shape.vocab_size:
            raise UsageError(f"{weight} cannot be {ours}, expected shape [{self.shape.vocab_size}, {width}]")
        return weight
