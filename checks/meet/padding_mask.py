"""A model's padding mask: which argument it is, and by trying its shape, polarity and dtype.

The model obeys a form of mask if changing masked tokens does not change the logits of real tokens, while changing real
tokens does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..subject import MaskForm
from . import vocabulary
from .call_forms import causal, parameters_of

DECLARED = vocabulary.words(
    "attentionmask attnmask padmask paddingmask mask keypaddingmask srckeypaddingmask tgtkeypaddingmask inputmask "
    "tokenmask seqmask sequencemask tgtmask trgmask srcmask masks ignore xmask tgtpaddingmask padmasks"
)
UNREAD = 1e-5  # how much masked tokens may change the logits, relative to real ones
ROUNDING = 16  # or by rounding, in units of the logits' type: a mixture's experts take their tokens in other groups
HEARD = 100  # times that rounding which a real token has to change them for the comparison to mean anything


def mask_argument(model: nn.Module, taken: frozenset[str] = frozenset()) -> str | None:
    """The parameter of forward that is named like a padding mask and has no other use."""
    found = [p.name for p in parameters_of(model) if vocabulary.squash(p.name) in DECLARED and p.name not in taken]
    return max(found, key=_declares, default=None)


def _declares(name: str) -> int:
    """How surely a parameter name means a padding mask."""
    plain = vocabulary.squash(name)
    return 2 * ("pad" in plain) + (plain in ("attentionmask", "mask")) - ("src" in plain)


def forms(argument: str) -> Iterator[MaskForm]:
    """The forms of mask to try, the most usual first."""
    usual = MaskForm(argument)
    drop_first = "pad" in vocabulary.squash(argument)  # key_padding_mask: torch's own modules drop what is true
    for shape in ("[B, T]", "[B, 1, 1, T]", "[B, T, T]", "[B, 1, T, T]"):
        shaped = replace(usual, shape=shape, with_causal=shape.endswith("T, T]"))
        for keep in (False, True) if drop_first else (True, False):
            yield replace(shaped, keep=keep)
            yield replace(shaped, keep=keep, dtype=torch.int64)
            yield replace(shaped, keep=keep, dtype=torch.float32)
        yield replace(shaped, dtype=torch.float32, additive=True)


Read = Callable[..., Tensor]  # tokens [B, T] and arguments of forward, to logits [B, T, V]


def obeyed(read: Read, form: MaskForm, tokens: Tensor, vocab_size: int) -> bool:
    """Whether real tokens do not depend on the tokens that the form masks, and do depend on others."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :2] = False
    masked, real = tokens.clone(), tokens.clone()
    masked[0, :2] = (masked[0, :2] + 1) % vocab_size
    real[0, 2] = (real[0, 2] + 1) % vocab_size
    given = {form.argument: form.encode(mask)}
    first, other, third = (read(x, **given)[0, 2:] for x in (tokens, masked, real))
    if not bool(first.isfinite().all()):
        return False
    heard = float((third - first)[1:].abs().max())
    rounding = ROUNDING * torch.finfo(first.dtype).eps * float(first.abs().max())
    allowed = max(UNREAD * heard, rounding if heard > HEARD * rounding else 0.0)
    return heard > 0 and float((other - first).abs().max()) <= allowed


def runs(read: Read, form: MaskForm, tokens: Tensor) -> bool:
    """Whether the model accepts a call with the form."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :2] = False
    try:
        read(tokens, **{form.argument: form.encode(mask)})
    except Exception:
        return False
    return True


def find_mask_forms(argument: str, read: Read, tokens: Tensor, vocab_size: int) -> tuple[MaskForm, ...]:
    """The model's form first, then the same in the other dtypes that the model accepts; () if it takes no mask.

    If no form is obeyed but a [B, T] one is accepted, that is the form: a check then reports that it is ignored.
    """
    found = next((f for f in forms(argument) if _tried(read, f, tokens, vocab_size)), None)
    if found is None:
        found = next((f for f in forms(argument) if f.shape == "[B, T]" and runs(read, f, tokens)), None)
    if found is None:
        return ()
    if "pad" not in vocabulary.squash(argument) and found.shape == "[B, 1, 1, T]":
        found = _beside_causal(read, found, tokens, vocab_size)
    others = [] if found.additive else [replace(found, dtype=d) for d in (torch.bool, torch.int64, torch.float32)]
    return (found, *(form for form in others if form != found and runs(read, form, tokens)))


def _beside_causal(read: Read, found: MaskForm, tokens: Tensor, vocab_size: int) -> MaskForm:
    """What to hand where the found form replaces the model's own causal mask; else the found form.

    Such an argument is the mask of attention itself: what is passed is used instead of the mask that the model makes.
    So the causal mask is included, unless the model combines a [B, T] mask with its own.
    """
    whole = replace(found, shape="[B, 1, T, T]", with_causal=True)
    ones, none = torch.ones_like(tokens, dtype=torch.bool), read(tokens)

    def changes(form: MaskForm) -> bool:
        return not torch.allclose(read(tokens, **{argument: form.encode(ones)}), none, rtol=0, atol=UNREAD)

    argument = found.argument
    if not changes(found):
        return found
    if _tried(read, whole, tokens, vocab_size) and not changes(whole):
        return whole
    rows = (f for f in forms(argument) if f.shape == "[B, T]" and runs(read, f, tokens) and not changes(f))
    return next(rows, found)


def _tried(read: Read, form: MaskForm, tokens: Tensor, vocab_size: int) -> bool:
    try:
        return obeyed(read, form, tokens, vocab_size)
    except Exception:
        return False


def causal_forms(model: nn.Module, taken: frozenset[str] = frozenset()) -> Iterator[tuple[str, str, Any]]:
    """Ways to pass a causal mask to a model that has none of its own: argument, its form in words, how to make it."""
    for parameter in parameters_of(model):
        plain = vocabulary.squash(parameter.name)
        if "mask" not in plain or "pad" in plain or parameter.name in taken:
            continue
        name = parameter.name
        yield name, "True keeps", lambda x: causal(x)
        yield name, "True drops", lambda x: ~causal(x)
        yield (
            name,
            "-inf drops",
            lambda x: torch.zeros(causal(x).shape, device=x.device).masked_fill(~causal(x), -torch.inf),
        )
        yield name, "[B, 1, T, T], True keeps", lambda x: causal(x)[None, None].expand(x.shape[0], 1, -1, -1)
        yield name, "[B, T, T], True keeps", lambda x: causal(x)[None].expand(x.shape[0], -1, -1)
