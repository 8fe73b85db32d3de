"""Attention as PyTorch's functions see it: queries, keys, softmax, masks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .calls import Call, recorded

ROTARY = re.compile(r"rotary|rotate_half|\brope\b|apply_rope|freqs_cis|rotate_every", re.IGNORECASE)
WIDE = ("no-causal-mask", "bool-mask-added-as-float", "mask-multiplied-after-softmax")
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}


def mentions_rotary(model: nn.Module) -> bool:
    """Whether the class of a module, or its source, names rotary positions."""
    return any(
        ROTARY.search(kind.__name__) or ROTARY.search(_source(kind)) for kind in {type(m) for m in model.modules()}
    )


def _source(kind: type) -> str:
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
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
        if func is F.scaled_dot_product_attention:
            self.found.append(fused(*args, **kwargs))
        elif getattr(func, "__name__", "") == "softmax" and args and args[0].shape[-2:] == (self.T, self.T):
            self.found.append(stepwise(args[0], result, kwargs.get("dim", args[1] if len(args) > 1 else -1)))
        return result


class LaterKeys(TorchFunctionMode):
    """`pairs` [T, T]: the later keys s to which some query t gave weight, in any softmax or fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.pairs = torch.zeros(T, T, dtype=torch.bool)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._see(_shown(*args, **kwargs))
        elif getattr(func, "__name__", "") == "softmax" and isinstance(result, Tensor):
            self._see(result > 0)
        return result

    def _see(self, seen: Tensor | None) -> None:
        if seen is not None and seen.shape[-2:] == self.pairs.shape:
            self.pairs |= seen.reshape(-1, *self.pairs.shape).any(dim=0).triu(1).cpu()


def _shown(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Tensor | None:
    """The keys [.., T, S] that fused attention shows to each query; None if it is causal by itself."""
    if more.get("is_causal", rest[1] if len(rest) > 1 else False):
        return None
    if attn_mask is None:
        return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf


def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any) -> Seen:
    shown = _shown(q, k, v, attn_mask, *rest, **more)
    if shown is None or q.shape[-2] == 1:
        return Seen("scaled_dot_product_attention was called with is_causal")
    if attn_mask is None:
        return Seen("scaled_dot_product_attention was called without is_causal and without a mask", ("no-causal-mask",))
    return Seen("The mask given to scaled_dot_product_attention lets queries see later keys", opened(shown))


def stepwise(scores: Tensor, weights: Tensor, dim: int) -> Seen:
    if dim % scores.dim() == scores.dim() - 2:
        return Seen("The softmax is over queries (axis -2), should be over keys (axis -1)", ("softmax-over-queries",))
    if dim % scores.dim() != scores.dim() - 1:
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
        name, T = getattr(func, "__name__", ""), args[0].shape[-2:] if args and isinstance(args[0], Tensor) else ()
        if name == "softmax" and len(T) == 2 and T[0] == T[1]:
            self._see(args[0].detach().double().tril())
        elif func is F.scaled_dot_product_attention and len(args) > 1:
            q, k = (x.detach().double().norm(dim=-1).max() for x in args[:2])
            self._see(q * k / args[0].shape[-1] ** 0.5)
        return func(*args, **(kwargs or {}))

    def _see(self, scores: Tensor) -> None:
        self.size = max(self.size, float(scores.abs().nan_to_num(posinf=0.0).max()))


class Products(TorchFunctionMode):
    """Records the queries and keys of every product of [.., T, D] and [.., D, T], and of every fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) >= 2 and all(isinstance(x, Tensor) for x in args[:2]):
            self.look(func, *args[:2])
        return func(*args, **(kwargs or {}))

    def look(self, func: Any, q: Tensor, k: Tensor) -> None:
        if func is F.scaled_dot_product_attention:
            self.found.append((q.detach(), k.detach()))
        elif func in PRODUCTS and q.dim() >= 3 and q.shape[-2] == self.T == k.shape[-1] and q.shape[-1] == k.shape[-2]:
            self.found.append((q.detach(), k.detach().transpose(-2, -1)))


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
    """Products of queries and keys, and their cosines; None if either is 0."""
    if q.shape[:-2] != k.shape[:-2]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    if not (bool(q.any()) and bool(k.any())):
        return None
    lengths = q.norm(dim=-1).mean() * k.norm(dim=-1).mean()
    unit = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return {"product": q @ k.transpose(-2, -1) / lengths, "cosine": unit}
