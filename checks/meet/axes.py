"""What the shape of a forward's output does not tell: which axis is time, and who brings the causal mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Forward, Way, parameters_of
from .logits import FLAT, PLAIN, TIME_FIRST
from .padding_mask import causal_forms

PLACE = 2  # of the token that is changed


def settle(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, *, is_causal: bool) -> Forward:
    """The same forward, read along the right axis, and with a causal mask if it only has one when it is handed one."""
    try:
        with torch.no_grad():
            if _reads_time_first(forward, model, tokens, vocab_size):
                return _transposed(forward)
            if is_causal:
                return _with_causal_mask(forward, model, tokens, vocab_size)
    except Exception:  # a model that fails here fails in its checks, which say more
        return forward
    return forward


def _changed(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, **more: Any) -> Tensor:
    """[B, T], where the logits change with the token at row 0, position 2; nowhere if they change by themselves."""
    other = tokens.clone()
    other[0, PLACE] = (other[0, PLACE] + 1) % vocab_size
    one, again, two = (forward.logits(model, x, **more) for x in (tokens, tokens, other))
    if not torch.equal(one, again):
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (one != two).any(dim=-1)


def _reads_time_first(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int) -> bool:
    """Whether a token is heard by the other rows at its own position, and its own row's other positions do not hear it.

    A model that mixes its rows by mistake looks the same but for its positions, which run along the other axis: there
    a text of one repeated token has different logits in different columns.
    """
    if min(tokens.shape) < PLACE + 1 or forward.layout not in (PLAIN, FLAT, TIME_FIRST) or forward.way.padded:
        return False
    changed = _changed(forward, model, tokens, vocab_size)
    others = changed.clone()
    others[:, PLACE] = False
    if bool(others.any()) or not bool(changed[1:, PLACE].any()):
        return False
    same = forward.logits(model, torch.zeros_like(tokens))
    return bool((same - same[:, :1]).abs().max() <= 1e-5 * same.abs().max())


def _transposed(forward: Forward) -> Forward:
    way = forward.way

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        return way.run(model, tokens.t().contiguous(), **more)

    says = way.says.replace("(", "([T, B] ", 1)
    return replace(
        forward, way=Way(says, run, way.assumed), layout=TIME_FIRST,
        assumed=(*forward.assumed, "time is the first axis"),
    )  # fmt: skip


def _with_causal_mask(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int) -> Forward:
    """Only where the future leaks without one, and no more leaks with one."""
    if tokens.shape[1] <= PLACE or not any("mask" in p.name for p in parameters_of(model)):
        return forward
    if not _leaks(forward, model, tokens, vocab_size):
        return forward
    for name, words, make in causal_forms(model):
        masked = replace(forward, more={**forward.more, name: make})
        try:
            helped = not _leaks(masked, model, tokens, vocab_size, heard=True)
        except Exception:
            continue
        if helped:
            return replace(masked, assumed=(*forward.assumed, f"{name} is given a causal mask ({words})"))
    return forward


def _leaks(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, *, heard: bool = False) -> bool:
    """Whether an earlier position hears the token; with `heard`, also whether no later one does."""
    changed = _changed(forward, model, tokens, vocab_size)
    return bool(changed[0, :PLACE].any()) or (heard and not bool(changed[0, PLACE + 1 :].any()))
