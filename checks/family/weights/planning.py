"""Candidate plans from an inventory, the likeliest first. Which of them is right is decided by comparing logits.

Weights outside the layers are told by shape and order of use. Norms are modules that own only vectors. In a layer the
matrices of attention are used before those of the feed-forward, and the output projection is the last of each. Names
only rank the candidates that are left: which of three equal matrices is the query.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations
from typing import Any

from torch import nn

from .inventory import Inventory, Weight, is_vector
from .roles import Matrix, NoPlan, Norm, Plan, Shape

Placed = tuple[Any, Weight]  # a weight, with its place in a layer (or itself outside the layers)
# What public code calls them: used for ranking only.
CALLED = {
    "q": r"(^|[._])(w?q|q_?proj|to_q|q_?lin(ear)?|quer(y|ies)|w_?q(uery)?|q_?attn|toqueries|linear_q)([._\d]|$)",
    "k": r"(^|[._])(w?k|k_?proj|to_k|k_?lin(ear)?|keys?|w_?k(ey)?|k_?attn|tokeys|linear_k)([._\d]|$)",
    "v": r"(^|[._])(w?v|v_?proj|to_v|v_?lin(ear)?|values?|w_?v(alue)?|v_?attn|tovalues|linear_v)([._\d]|$)",
    "gate": r"gate|(^|[._])w_?1([._]|$)|fc_?1([._]|$)|glu|linear_?1",
    "input": r"up|(^|[._])w_?[23]([._]|$)|fc_?2([._]|$)|(^|[._])v([._]|$)|linear_?2|input",
}


def plans(inventory: Inventory, shape: Shape) -> Iterator[Plan]:
    """Candidate plans. Raises NoPlan, with the reason, if the weights can be neither a GPT-2's nor a Llama's."""
    yield from arranged(_plan(inventory, shape))


def arranged(plan: Plan) -> Iterator[Plan]:
    """The plan with queries, keys and values, and gate and input, in every order that is still possible."""
    for arrangement in arrangements(plan):
        for gate_first in _gates(plan):
            yield replace(plan, arrangement=arrangement, gate_first=gate_first, feed_forward=_gated(plan, gate_first))


def _plan(inventory: Inventory, shape: Shape) -> Plan:
    if not inventory.layers:
        raise NoPlan("no modules with the same weights repeat once per layer")
    layer = inventory.layers[0]
    if any([w.shape for w in other] != [w.shape for w in layer] for other in inventory.layers):
        raise NoPlan("the layers have weights of different shapes")
    outer = _outer(inventory, shape)
    norms = _norms([(place, w) for place, w in enumerate(layer)], shape.n_embd)
    matrices = _matrices(layer, shape, norms)
    attention, feed_forward = _split(matrices, layer, shape)
    form, n_kv_head = _form(attention, layer, shape)
    sublayer_norms = norms[:2] if len(norms) > 1 else norms * 2
    plan = Plan(
        inventory,
        shape,
        n_kv_head,
        **outer,
        attention_norm=sublayer_norms[0] if norms else None,
        feed_forward_norm=sublayer_norms[1] if norms else None,
        form=form,
        attention=tuple(attention[:-1]),
        output=attention[-1],
        feed_forward=tuple(feed_forward[:-1]),
        feed_forward_output=feed_forward[-1],
        gated=len(feed_forward) == 3 or feed_forward[0].out == 2 * feed_forward[-1].into,
    )
    return replace(plan, unplaced=tuple(_unplaced(plan)))


def _outer(inventory: Inventory, shape: Shape) -> dict[str, Any]:
    """Embedding, positions, head and final norm among the weights outside the layers."""
    V, T, C = shape.vocab_size, shape.block_size, shape.n_embd
    layers = [w.order for layer in inventory.layers for w in layer if w.order is not None]
    first, last = min(layers, default=0), max(layers, default=0)
    tables = [w for w in inventory.outer if not w.is_vector]
    matrices = [w for w in tables if C in w.shape and len(w.shape) == 2 and w.numel // C >= V]
    if not matrices:
        raise NoPlan(f"no weight has the shape of a token embedding, [{V}, {C}]")
    looked_up = [w for w in matrices if w.by == "embedding"] or matrices
    vocabulary = [w for w in matrices if w.numel == looked_up[0].numel]
    rest = [w for w in tables if w not in vocabulary]
    positions = [w for w in rest if w.shape[-1] == C and w.numel // C >= T and (w.order or 0) < first]
    fixed = [w for w in inventory.buffers if w.shape[-1:] == (C,) and w.numel // C >= T]
    vectors = [(w, w) for w in inventory.outer if w.is_vector]
    after = [n for n in _norms(vectors, C) if n.gain.order is None or n.gain.order > last]
    bias = [w for w in inventory.outer if w.is_vector and w.numel == vocabulary[-1].numel // C]
    return dict(
        embedding=vocabulary[0],
        head=vocabulary[-1],
        positions=next(iter(positions or fixed), None),
        final_norm=after[-1] if after else None,
        head_bias=bias[0] if bias else None,
    )


def _norms(weights: list[Placed], width: int) -> list[Norm]:
    """Norms in order of use."""
    found: dict[object, list[Placed]] = {}
    before: object = None  # the last gain, whose bias may follow
    for place, weight in weights:
        key = _norm_key(weight, before) if weight.is_vector and weight.numel == width else None
        if key is not None:
            found.setdefault(key, []).append((place, weight))
        before = key if key == ("gain", id(weight)) else None
    return [_norm(pair) for pair in found.values() if len(pair) <= 2]


def _norm_key(weight: Weight, gain_before: object) -> object:
    """What gain and bias of a norm have in common: the call, the owner, or that they follow each other as 1 and 0."""
    if weight.by in ("layer_norm", "rms_norm"):
        return "call", weight.call
    owned = list(weight.owner.parameters(recurse=False))
    in_list = isinstance(weight.owner, nn.ParameterList | nn.ParameterDict)
    if all(is_vector(p) for p in owned) and not in_list and len(owned) <= 2:
        return "owner", id(weight.owner)
    if bool((weight.start == 1).all()):
        return "gain", id(weight)
    return gain_before if bool((weight.start == 0).all()) else None


def _norm(pair: list[Placed]) -> Norm:
    """A gain starts at one and a bias at zero. A gain without a bias that starts at zero is stored minus one."""
    if len(pair) == 1:
        place, weight = pair[0]
        return Norm(place, minus_one=bool((weight.start == 0).all()))
    (a, first), (b, second) = pair
    swapped = bool((first.start == 0).all()) and not bool((second.start == 0).all())
    return Norm(b, a) if swapped else Norm(a, b)


def _matrices(layer: list[Weight], shape: Shape, norms: list[Norm]) -> list[Matrix]:
    """The projections of a layer in order of use, each with its bias."""
    taken = {place for norm in norms for place in (norm.gain, norm.bias) if place is not None}
    vectors = {p: w for p, w in enumerate(layer) if _is_bias(w, shape) and p not in taken}
    found = []
    for place, weight in enumerate(layer):
        if place in taken or _is_bias(weight, shape):
            continue
        out, into = _sizes(weight, shape)
        bias = _beside(place, weight, (out, into), vectors)
        if bias is not None and weight.input_first is None and vectors[bias].numel == into != out:
            out, into = into, out
        if bias is not None:
            vectors.pop(bias)
        found.append(Matrix(place, bias, out, into))
    return found


def _is_bias(weight: Weight, shape: Shape) -> bool:
    per_head = len(weight.shape) in (2, 3) and weight.shape[-1] == shape.head_width != shape.n_embd
    return weight.is_vector or (per_head and shape.n_embd not in weight.shape)


def _sizes(weight: Weight, shape: Shape) -> tuple[int, int]:
    """(out, in) of a matrix, or of a stack of matrices, one per head."""
    C = shape.n_embd
    if len(weight.shape) == 3 and weight.by == "conv1d":
        return weight.shape[0], weight.shape[1]
    if len(weight.shape) in (3, 4) and C in weight.shape:
        return weight.numel // C, C
    if len(weight.shape) != 2:
        raise NoPlan(f"{weight} is neither a matrix nor a stack of matrices, one per head")
    a, b = weight.shape
    return (b, a) if weight.input_first else (a, b)


def _beside(place: int, weight: Weight, sizes: tuple[int, int], vectors: dict[int, Weight]) -> int | None:
    """The place of a matrix's bias: used in the same call, or of the same owner and as long as the output."""
    out, into = sizes
    for other, vector in vectors.items():
        if vector.call is not None and vector.call == weight.call and vector.numel in (out, into):
            return other
    mine = [p for p, v in vectors.items() if v.owner is weight.owner and v.numel == out]
    mine = mine or [p for p, v in vectors.items() if v.owner is weight.owner and v.numel == into != out]
    if place + 1 in mine:  # used right after
        return place + 1
    if len(mine) > 1:  # several matrices in one module: the vector with the most similar name
        mine.sort(key=lambda p: -_alike(vectors[p].name, weight.name))
    return mine[0] if mine else None


def _alike(one: str, other: str) -> int:
    return sum(a == b for a, b in zip(reversed(one), reversed(other), strict=False)) + len(
        set(re.findall(r"[a-z]+", one.lower())) & set(re.findall(r"[a-z]+", other.lower()))
    )


def _split(matrices: list[Matrix], layer: list[Weight], shape: Shape) -> tuple[list[Matrix], list[Matrix]]:
    """The projections of attention, and those of the feed-forward."""
    C = shape.n_embd
    for count in (3, 2):
        if len(matrices) <= count:
            continue
        *inside, last = matrices[-count:]
        if last.out != C or any(m.into != C for m in inside):
            continue
        widths = {m.out for m in inside}
        gated_in_one = count == 2 and widths == {2 * last.into}
        if (widths == {last.into} or gated_in_one) and _plausible(matrices[:-count], shape):
            return matrices[:-count], [*inside, last]
    raise NoPlan("the projections of a layer are neither a GPT-2's nor a Llama's: "
                 + ", ".join(str(layer[m.at]) for m in matrices))  # fmt: skip


def _plausible(attention: list[Matrix], shape: Shape) -> bool:
    C, D = shape.n_embd, shape.head_width
    if len(attention) < 2:
        return False
    *inside, output = attention
    if any(m.into != C for m in inside) or output.out != C or output.into != shape.n_head * D:
        return False
    total = sum(m.out for m in inside) - shape.n_head * D
    return total > 0 and total % (2 * D) == 0


def _form(attention: list[Matrix], layer: list[Weight], shape: Shape) -> tuple[str, int]:
    """How queries, keys and values are held, and the number of key-value heads."""
    H, D = shape.n_head, shape.head_width
    inside = attention[:-1]
    n_kv_head = (sum(m.out for m in inside) - H * D) // (2 * D)
    if H % n_kv_head:
        raise NoPlan(f"{H} query heads are no multiple of {n_kv_head} key-value heads")
    outs = sorted(m.out for m in inside)
    if len(inside) == 1:
        return "fused", n_kv_head
    if len(inside) == 3 and outs == sorted((H * D, n_kv_head * D, n_kv_head * D)):
        return "split", n_kv_head
    if len(inside) == 2 and outs == sorted((H * D, 2 * n_kv_head * D)):
        return "query and pair", n_kv_head
    if len(inside) == 3 * H and set(outs) == {D}:
        return "per head", n_kv_head
    raise NoPlan("the query, key and value weights have unknown shapes: " + ", ".join(str(layer[m.at]) for m in inside))


def arrangements(plan: Plan) -> list[str]:
    """The possible layouts of queries, keys and values, the usual ones and those that fit the names first."""
    letters = ["".join(p) for p in permutations("qkv")]
    if plan.form == "fused" and plan.n_kv_head == plan.shape.n_head:
        return [f"{p}|{layout}" for layout in ("3hd", "h3d", "hd3", "3dh", "d3h", "dh3") for p in letters]
    if plan.form in ("fused", "query and pair"):
        orders = letters if plan.form == "fused" else ["qkv", "qvk"]
        layouts = ("3hd", "h3d", "hd3") if plan.form == "query and pair" else ("3hd",)
        return [f"{p}|{layout}" for layout in (*layouts, "grouped") for p in orders]
    if plan.from_table:
        return ["qkv|hd"] if plan.form == "per head" else ["qkv|hd", "qkv|dh"]
    layer = plan.inventory.layers[0]
    names = [layer[m.at].name for m in plan.attention[:3]]
    fits = [p for p in letters if _sizes_fit(p, plan)]
    fits.sort(key=lambda p: -sum(called(name, letter) for name, letter in zip(names, p, strict=True)))
    return [
        f"{p}|{layout}" for layout in ("hd", "dh") for p in fits if not (layout == "dh" and plan.form == "per head")
    ]


def _sizes_fit(letters: str, plan: Plan) -> bool:
    if plan.form == "per head":
        return True
    heads = dict(q=plan.shape.n_head, k=plan.n_kv_head, v=plan.n_kv_head)
    return all(
        m.out == heads[letter] * plan.shape.head_width for letter, m in zip(letters, plan.attention, strict=True)
    )


def called(name: str, role: str) -> bool:
    """Whether this is a usual name for this role."""
    return re.search(CALLED[role], name.lower()) is not None


def _gates(plan: Plan) -> tuple[bool, ...]:
    if not plan.gated or (plan.from_table and len(plan.feed_forward) == 2):
        return (True,)
    names = [plan.inventory.layers[0][m.at].name for m in plan.feed_forward]
    if len(names) == 1:
        return (True, False)
    swapped = called(names[1], "gate") and not called(names[0], "gate")
    return (False, True) if swapped else (True, False)


def undetermined(plan: Plan) -> list[str]:
    """The weights whose roles follow neither from shapes nor from names nor from a table."""
    layer = plan.inventory.layers[0]
    names = [layer[m.at].name for m in plan.attention]
    if plan.form == "fused":
        return [f"{names[0]} (the order of queries, keys and values in it)"]
    if plan.from_table:
        return []
    open_ = names if plan.form != "query and pair" else []
    if plan.form == "split" and all(called(n, letter) for n, letter in zip(names, plan.arrangement, strict=False)):
        open_ = []
    inside = [layer[m.at].name for m in plan.feed_forward]
    return open_ + (inside if len(inside) == 2 and not any(called(name, "gate") for name in inside) else [])


def _gated(plan: Plan, gate_first: bool) -> tuple[Matrix, ...]:
    """The feed-forward's matrices, gate before input."""
    return plan.feed_forward if gate_first or len(plan.feed_forward) == 1 else plan.feed_forward[::-1]


def _unplaced(plan: Plan) -> list[Weight]:
    """Weights that the plan does not use."""
    matrices = (*plan.attention, plan.output, *plan.feed_forward, plan.feed_forward_output)
    places = {place for m in matrices for place in (m.at, m.bias)}
    norms = (plan.attention_norm, plan.feed_forward_norm)
    places |= {place for norm in norms if norm for place in (norm.gain, norm.bias)}
    outer = [plan.embedding, plan.positions, plan.head, plan.head_bias]
    outer += [plan.final_norm.gain, plan.final_norm.bias] if plan.final_norm else []
    loose = [w for w in plan.inventory.outer if w not in outer]
    return loose + [w for layer in plan.inventory.layers for place, w in enumerate(layer) if place not in places]
