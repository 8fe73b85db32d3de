"""What may happen to a model between two equal calls, and the first module that then computes something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import Where, expect_close
from ..subject import Subject
from ..watch.calls import recorded
from ..watch.location import locate
from ..ways import TRAIN
from .influence import call, length
from .long import LONG
from .module_state import buffers_kept
from .padding import SIDES, ragged
from .precision import precise, precision


def interludes(subject: Subject, T: int) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """What may happen between two equal calls: a name, and what to do to the model."""
    others = subject.tokens(3, T, seed=subject.seed + 1)
    yield "the same call", lambda model: call(subject, model, subject.tokens(3, T, seed=subject.seed))
    yield "other tokens", lambda model: call(subject, model, others)
    yield "a shorter sequence", lambda model: call(subject, model, others[:, : max(T // 2, 2)].contiguous())
    yield "more rows", lambda model: call(subject, model, subject.tokens(5, T, seed=2))
    yield "a single token", partial(read_one, subject)
    yield "a call in train mode", partial(call, subject, tokens=others, way=TRAIN)
    yield "a backward pass in train mode", partial(learn, subject, others)
    yield "a call under autocast", partial(read_in_half, subject, others)
    for side in SIDES if subject.takes_mask else ():
        mask = ragged(3, T, side, seed=subject.seed).to(subject.device)
        yield f"a call with a mask (padding: {side})", partial(call, subject, tokens=others, mask=mask)


def read_one(subject: Subject, model: nn.Module) -> None:
    with suppress(ValueError, AssertionError):  # some models refuse it with an error
        call(subject, model, subject.tokens(1, 1, seed=subject.seed))


def read_in_half(subject: Subject, tokens: Tensor, model: nn.Module) -> None:
    """Models and operations that cannot be autocast are not judged here."""
    with suppress(Exception), torch.autocast(subject.device.type, dtype=torch.bfloat16):
        call(subject, model, tokens)


def learn(subject: Subject, tokens: Tensor, model: nn.Module) -> None:
    """A backward pass without an optimizer step."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), buffers_kept(model):
        torch.autograd.backward(subject.logits(model.train(), tokens).square().mean())
    model.zero_grad(set_to_none=True)
    model.eval()


def first_difference(subject: Subject, model: nn.Module, other: nn.Module, tokens: Tensor) -> Where | None:
    """The first module, in two models of one architecture, whose outputs differ although its inputs do not."""
    with recorded(model) as one:
        call(subject, model, tokens)
    with recorded(other) as two:
        call(subject, other, tokens)
    for a, b in zip(one, two, strict=False):
        if a.module == b.module and differ(a.outputs, b.outputs) and not differ(a.inputs, b.inputs):
            return locate(model, a.module)
    return None


def differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(some, others, strict=False))


def expect_no_trace_of_a_longer_text(subject: Subject) -> None:
    """A table or a scale that has grown for a long text must not stay with the short one that follows."""
    sizes: dict[str, Any] = {"block_size": LONG} if subject.can_vary("block_size") else {}
    longer = LONG if sizes else min(subject.longest or LONG, LONG)
    short = subject.tokens(2, max(length(subject) // 2, 1), seed=subject.seed)
    if longer <= 2 * short.shape[1] or subject.affordable(longer, 1, least=0) < 1:
        return

    def after(*lengths: int) -> nn.Module:
        model = precise(subject, **sizes)
        for T in lengths:
            call(subject, model, subject.tokens(1, T, seed=subject.seed + 1))
        return model

    try:
        grown = after(longer)
    except Exception:  # it reads no text of this length, whatever its limit; other checks judge that
        return
    first = call(subject, after(), short)
    expect_close(
        call(subject, grown, short),
        first,
        bound=precision(subject).bound(first),
        says=f"after a text of {longer} tokens, one of {short.shape[1]} gets different logits than from a fresh model",
        where=lambda: first_difference(subject, after(), after(longer), short),
        likely=("scale-stays-after-a-long-text", "state-leaks-between-calls"),
        advice="Look for a table, a scale or a length that forward keeps on self: compute it from the text at hand.",
        between="a longer text",
    )
