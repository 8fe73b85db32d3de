"""A model whose logits are given by a script of the tokens that it reads, whoever calls it and in whatever form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..generation.calls import find_logits, read_tokens, replace_logits
from ..subject import Subject

Script = Callable[[Tensor], Tensor]  # token ids [B, T] to logits [B, T, V]


@contextmanager
def scripted(subject: Subject, model: nn.Module, script: Script) -> Iterator[None]:
    """Inside, the model's logits are those of the script; a loss that it computes itself is of these.

    Raises NotApplicable for a model whose logits cannot be replaced before it computes a loss.
    """
    head = subject.once(_head)
    module, V = model.get_submodule(head), subject.width
    outer, inner = model.forward, module.forward
    read: list[Tensor] = []

    @functools.wraps(outer)
    def reading(*args: Any, **kwargs: Any) -> Any:
        tokens = read_tokens(args, kwargs)
        if tokens is None:
            raise NotApplicable("the model was called without token ids")
        read.append(tokens)
        try:
            answer = outer(*args, **kwargs)
            return replaced(answer) if module is model else answer
        finally:
            read.pop()

    def replaced(answer: Any) -> Any:
        if module is model and not isinstance(answer, Tensor) and _has_loss(answer):
            raise NotApplicable("the model computes its loss from logits that cannot be replaced")
        return replace_logits(answer, V, answered)

    def answered(logits: Tensor) -> Tensor:
        tokens = read[-1] if read[-1].dim() == 2 else read[-1][None]
        given = script(tokens).log_softmax(-1)
        if subject.returns == "probabilities" and module is model:
            given = given.exp()
        if given.numel() != logits.numel():  # of the latest positions alone
            given = given[:, -(logits.numel() // V // len(given)) :]
        return given.reshape(logits.shape).to(logits.dtype)

    model.__dict__["forward"] = reading
    if module is not model:
        module.__dict__["forward"] = functools.wraps(inner)(lambda *args, **kwargs: replaced(inner(*args, **kwargs)))
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
        module.__dict__.pop("forward", None)


def _has_loss(answer: Any) -> bool:
    items = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, tuple | list) else ()
    return any(isinstance(item, Tensor) and item.dim() == 0 for item in (*items, getattr(answer, "loss", None)))


def _head(subject: Subject) -> str:
    """The last module whose output the model returns unchanged as its logits; "" (the model) where there is none."""
    model, tokens = subject.build(), subject.tokens(2, min(4, subject.sizes.block_size), seed=subject.seed)
    outputs: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            logits = find_logits(output, subject.width)
            if logits is not None and logits.shape[:-1] == tokens.shape:
                outputs.append((name, logits))

        return note

    hooks = [module.register_forward_hook(noting(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            logits = subject.logits(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, output in reversed(outputs) if torch.equal(output, logits)), "")
