"""What the output's shape does not show: which axis is time, and whether the model needs a causal mask passed in."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .call_forms import CallForm, parameters_of
from .forward import Forward
from .handed import handed_over
from .logits import FLAT, PLAIN, TIME_FIRST
from .padding_mask import causal_forms

PLACE = 2  # of the token that is changed


def refine(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, *, is_causal: bool) -> Forward:
    """The same forward with its axes in the right order, and given a causal mask if it is causal only with one."""
    try:
        with torch.no_grad():
            if _reads_time_first(forward, model, tokens, vocab_size):
                return _transposed(forward)
            if is_causal:
                return _with_causal_mask(forward, model, tokens, vocab_size)
    except Exception:  # a model that fails here fails in its checks too, which say more
        return forward
    return forward


def _changed(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, **more: Any) -> Tensor:
    """[B, T], True where the logits change with the token at row 0, position 2; all False if they are random."""
    other = tokens.clone()
    other[0, PLACE] = (other[0, PLACE] + 1) % vocab_size
    one, again, two = (forward.logits(model, x, **more) for x in (tokens, tokens, other))
    if not torch.equal(one, again):
        return torch.zeros_like(tokens, dtype=torch.bool)
    return (one != two).any(dim=-1)


def _reads_time_first(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int) -> bool:
    """Whether changing a token changes other rows at its own position, but no other position of its own row.

    A model that mixes rows by mistake looks the same, except that its positions run along the other axis: for a text of
    one repeated token its logits differ from column to column.
    """
    if min(tokens.shape) < PLACE + 1 or forward.layout not in (PLAIN, FLAT, TIME_FIRST) or forward.call.padded:
        return False
    changed = _changed(forward, model, tokens, vocab_size)
    others = changed.clone()
    others[:, PLACE] = False
    if bool(others.any()) or not bool(changed[1:, PLACE].any()):
        return False
    same = forward.logits(model, torch.zeros_like(tokens))
    return bool((same - same[:, :1]).abs().max() <= 1e-5 * same.abs().max())


def _transposed(forward: Forward) -> Forward:
    form = forward.call

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        return form.run(model, tokens.t().contiguous(), **more)

    says = form.says.replace("(", "([T, B] ", 1)
    return replace(
        forward, call=CallForm(says, run, form.assumed), layout=TIME_FIRST,
        assumed=(*forward.assumed, "the time axis comes first"),
    )  # fmt: skip


def _with_causal_mask(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int) -> Forward:
    """Passes a causal mask if future tokens leak without one and no longer leak with one.

    Only where forward requires it, or the user's own code gives it: a mask that may be left out is one that its callers
    leave out, and what they get is judged.
    """
    if tokens.shape[1] <= PLACE or not any("mask" in p.name for p in parameters_of(model)):
        return forward
    if not _leaks(forward, model, tokens, vocab_size):
        return forward
    for name, words, make in causal_forms(model):
        masked = replace(forward, more={**forward.more, name: make})
        try:
            helped = not _leaks(masked, model, tokens, vocab_size, reaches=True)
        except Exception:
            continue
        if not helped:
            continue
        says = f"a causal mask is passed as {name} ({words})"
        if inspect.signature(model.forward).parameters[name].default is not inspect.Parameter.empty:
            caller = handed_over(model, name)
            if caller is None:
                return replace(forward, mask_left_out=name)
            says += f", as in {caller}"
        return replace(masked, assumed=(*forward.assumed, says))
    return forward


def _leaks(forward: Forward, model: nn.Module, tokens: Tensor, vocab_size: int, *, reaches: bool = False) -> bool:
    """Whether a token changes earlier logits; with `reaches`, also True if it changes no later ones."""
    changed = _changed(forward, model, tokens, vocab_size)
    return bool(changed[0, :PLACE].any()) or (reaches and not bool(changed[0, PLACE + 1 :].any()))
