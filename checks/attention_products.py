"""What enters a softmax: queries and keys, seen as PyTorch multiplies them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from checks.ablation import siblings
from checks.influence import call
from checks.where import recorded

ROTARY = re.compile(r"rotary|rotate_half|\brope\b|apply_rope|freqs_cis|rotate_every", re.IGNORECASE)
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


class Products(TorchFunctionMode):
    """Keeps the queries and keys of the first product of [.., T, D] and [.., D, T], or of the first fused attention."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T
        self.found: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is None and len(args) >= 2 and all(isinstance(x, Tensor) for x in args[:2]):
            self.look(func, *args[:2])
        return func(*args, **(kwargs or {}))

    def look(self, func: Any, q: Tensor, k: Tensor) -> None:
        if func is F.scaled_dot_product_attention:
            self.found = q.detach(), k.detach()
        elif func in PRODUCTS and q.dim() >= 3 and q.shape[-2] == self.T == k.shape[-1] and q.shape[-1] == k.shape[-2]:
            self.found = q.detach(), k.detach().transpose(-2, -1)


def key_products(subject: Any, model: nn.Module, tokens: Tensor) -> dict[str, Tensor] | None:
    """The first layer's products of queries and keys [.., T, T], in units of their mean length, and as cosines.

    None where there is none, or where equal tokens enter the first block as different vectors.
    """
    with recorded(model) as calls, Products(tokens.shape[1]) as products:
        call(subject, model, tokens)
    blocks = next(iter(siblings(model)), [])
    first = next((done for done in calls if done.module in blocks[:1]), None)
    if products.found is None or first is None or not first.inputs:
        return None
    x = first.inputs[0]
    if x.dim() != 3 or x.shape[1] != tokens.shape[1] or not torch.allclose(x, x[:, :1], atol=1e-12):
        return None
    q, k = products.found
    if q.shape[:-2] != k.shape[:-2]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    if not (bool(q.any()) and bool(k.any())):
        return None
    lengths = q.norm(dim=-1).mean() * k.norm(dim=-1).mean()
    unit = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return {"product": q @ k.transpose(-2, -1) / lengths, "cosine": unit}
