"""A model's token embeddings as leaves of the graph, and the gradients of its logits with respect to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ablation import replaced


@contextmanager
def watched_embeddings(model: nn.Module, tokens: Tensor) -> Iterator[list[Tensor]]:
    """Cuts the graph after every module that maps exactly these tokens to vectors; yields the vectors as leaves."""
    found: list[Tensor] = []

    def wrap(forward: Any) -> Any:
        def watching(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and not a.is_floating_point()]
            if isinstance(out, Tensor) and out.is_floating_point() and any(same_tokens(a, tokens) for a in given):
                leaf = out.detach().requires_grad_()
                found.append(leaf)
                return leaf.clone()  # which the model may scale in place, as it could the module's own output
            return out

        return watching

    with ExitStack() as stack:
        for module in model.modules():
            if not any(True for _ in module.children()):
                stack.enter_context(replaced(module, wrap))
        yield found


def same_tokens(given: Tensor, tokens: Tensor) -> bool:
    return given.numel() == tokens.numel() and bool((given.flatten() == tokens.flatten()).all())


def jacobian_sizes(logits: Tensor, embedding: Tensor) -> Tensor:
    """[T, T], row t, column s: the largest gradient, in the embedding of token s, of a random sum of the logits at t.

    logits [T, V]; the embedding has one axis of length T.
    """
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0)).to(logits)
    rows = []
    for t in range(len(logits)):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedding, retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(embedding) if gradient is None else gradient
        time = next(axis for axis, size in enumerate(embedding.shape) if size == len(logits))
        rows.append(gradient.abs().movedim(time, 0).flatten(1).amax(dim=1))
    return torch.stack(rows)
