"""Attention as PyTorch's functions see it: queries, keys, softmax, masks."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..subject import Subject
from .calls import Call, recorded
from .operations import Attention, fused_attention, product, softmax_axis, softmax_input

ROTARY = re.compile(r"(?<![a-z])(rope|rotary|rotate|rotat(ed|ion|or)?|rot|freqs_?cis)(?![a-z])", re.IGNORECASE)
IN_CAMEL_CASE = re.compile(r"RoPE|Rope(?![a-z])|Rotary|Rotat")
WIDE = ("no-causal-mask", "bool-mask-added-as-float", "mask-multiplied-after-softmax")


def mentions_rotary(subject: Subject, model: nn.Module) -> bool:
    """Whether a name in the subject's own code, or the class of a module or its source, speaks of rotary positions."""
    kinds = {type(module) for module in model.modules()}
    said = [kind.__name__ for kind in kinds] + [_source(kind) for kind in kinds]
    said += [name for _, nodes in subject.code() for node in nodes for name in _names(node)]
    return any(ROTARY.search(text) or IN_CAMEL_CASE.search(text) for text in said)


def _names(node: ast.AST) -> Iterator[str]:
    for field in ("name", "id", "attr", "arg"):
        if isinstance(name := getattr(node, field, None), str):
            yield name


def _source(kind: type) -> str:
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # of a file that was loaded by its path: Subject.code has it
        return ""


@dataclass
class Seen:
    """What one attention did, in a sentence, and the known bugs that do so; none if it sees only the past."""

    says: str
    causes: tuple[str, ...] = ()


class Attentions(TorchFunctionMode):
    """Records which keys each query sees, for every softmax over [.., T, T] scores and every fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.found: list[Seen] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        axis = softmax_axis(func, args, kwargs)
        if (given := fused_attention(func, args, kwargs)) is not None:
            self.found.append(fused(given))
        elif axis is not None and (scores := softmax_input(args, kwargs)).shape[-2:] == (self.T, self.T):
            self.found.append(stepwise(scores, result, axis))
        return result


class LaterKeys(TorchFunctionMode):
    """`pairs` [T, T]: the later keys s to which some query t gave weight, in any softmax or fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.pairs = torch.zeros(T, T, dtype=torch.bool)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (given := fused_attention(func, args, kwargs)) is not None:
            self._see(_shown(given))
        elif softmax_axis(func, args, kwargs) is not None and isinstance(result, Tensor):
            self._see(result > 0)
        return result

    def _see(self, seen: Tensor | None) -> None:
        if seen is not None and seen.shape[-2:] == self.pairs.shape:
            self.pairs |= seen.reshape(-1, *self.pairs.shape).any(dim=0).triu(1).cpu()


def _shown(given: Attention) -> Tensor | None:
    """The keys [.., T, S] that fused attention shows to each query; None if it is causal by itself."""
    if given.causal:
        return None
    if given.mask is None:
        return torch.ones(given.query.shape[-2], given.key.shape[-2], dtype=torch.bool)
    return given.mask if given.mask.dtype == torch.bool else given.mask > -torch.inf


def fused(given: Attention) -> Seen:
    shown = _shown(given)
    if shown is None or given.query.shape[-2] == 1:
        return Seen("scaled_dot_product_attention was called with is_causal")
    if given.mask is None:
        return Seen("scaled_dot_product_attention was called without is_causal and without a mask", ("no-causal-mask",))
    return Seen("The mask given to scaled_dot_product_attention lets queries see later keys", opened(shown))


def stepwise(scores: Tensor, weights: Tensor, dim: int) -> Seen:
    if dim == -2:
        return Seen("The softmax is over queries (axis -2), should be over keys (axis -1)", ("softmax-over-queries",))
    if dim != -1:
        return Seen(f"The softmax is over axis {dim}, should be over keys (axis -1)", ("softmax-over-heads",))
    causes = opened(weights > 0)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    fill = scores[..., future].flatten()
    if causes[:1] == WIDE[:1] and bool((fill == fill[0]).all()):
        says = f"Masked scores are {float(fill[0]):g}, which still gives later keys some weight in the softmax"
        return Seen(says, ("mask-fill-not-negative-enough",))
    return Seen("The softmax gives weight to later keys", causes)


def opened(seen: Tensor) -> tuple[str, ...]:
    """The known bugs that let these later keys be seen; none if queries see only the past. seen [.., T, S]."""
    T = seen.shape[-2]
    t, s = seen.reshape(-1, *seen.shape[-2:]).any(dim=0).triu(1).nonzero(as_tuple=True)
    if not len(t):
        return ()
    if len(t) == 1 < T - 1:
        return ("one-position-leaks",)
    if int(t.max()) == 0:
        return ("causal-excludes-self",)
    farthest = int((s - t).max())
    if farthest == 1:
        return ("causal-sees-one-future",)
    return ("window-to-both-sides",) if farthest < T - 1 and int(t.max()) == T - 2 else WIDE


class LargestScore(TorchFunctionMode):
    """The largest score of a query and a key that it may see, in any softmax over [.., T, T] or fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (given := fused_attention(func, args, kwargs)) is not None:
            q, k = (x.detach().double().norm(dim=-1).max() for x in (given.query, given.key))
            self._see(q * k / given.query.shape[-1] ** 0.5)
        elif softmax_axis(func, args, kwargs) is not None:
            scores = softmax_input(args, kwargs)
            if scores.dim() > 1 and scores.shape[-2] == scores.shape[-1]:
                self._see(scores.detach().double().tril())
        return func(*args, **kwargs)

    def _see(self, scores: Tensor) -> None:
        self.size = max(self.size, float(scores.abs().nan_to_num(posinf=0.0).max()))


class Products(TorchFunctionMode):
    """Records the queries and keys of every product of [.., T, D] and [.., D, T], and of every fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (given := fused_attention(func, args, kwargs)) is not None:
            self.found.append((given.query.detach(), given.key.detach()))
        elif (factors := product(func, args, kwargs)) is not None:
            q, k = factors.left.detach(), factors.right.detach()
            if q.dim() >= 3 and k.dim() >= 3 and q.shape[-2] == self.T == k.shape[-1] and q.shape[-1] == k.shape[-2]:
                self.found.append((q, k.transpose(-2, -1)))
        return func(*args, **kwargs)


def key_products(
    model: nn.Module, blocks: list[str], T: int, run: Callable[[], object]
) -> dict[str, dict[str, Tensor]]:
    """By block: its first products of queries and keys [.., T, T], in units of their mean length, and their cosines.

    `run` is a forward over T equal tokens. Blocks that these enter as different vectors are left out. If the products
    cannot be divided evenly among the blocks, only the first block is included.
    """
    with recorded(model) as calls, Products(T) as products:
        run()
    each, left = divmod(len(products.found), len(blocks) or 1)
    told = blocks if each and not left else blocks[: len(products.found)][:1]
    alike = [name for name in told if _enters_alike(calls, name, T)]
    given = {name: _compared(*products.found[each * blocks.index(name)]) for name in alike}
    return {name: products for name, products in given.items() if products is not None}


def _enters_alike(calls: list[Call], block: str, T: int) -> bool:
    """Whether every token enters the block as the same vector."""
    call = next((call for call in calls if call.module == block and call.inputs), None)
    x = None if call is None else call.inputs[0]
    return x is not None and x.dim() == 3 and x.shape[1] == T and torch.allclose(x, x[:, :1], atol=1e-12)


def _compared(q: Tensor, k: Tensor) -> dict[str, Tensor] | None:
    """Products of queries and the keys of the same tokens, and their cosines; None if either is 0.

    A cache of a fixed length has empty places after them.
    """
    if k.shape[-2] < q.shape[-2]:
        return None
    k = k[..., : q.shape[-2], :]
    if q.shape[:-2] != k.shape[:-2]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    if not (bool(q.any()) and bool(k.any())):
        return None
    lengths = q.norm(dim=-1).mean() * k.norm(dim=-1).mean()
    unit = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return {"product": q @ k.transpose(-2, -1) / lengths, "cosine": unit}
