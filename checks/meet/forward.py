"""How a model is called for logits [B, T, V]: tries the call forms and keeps the one that works, as a `Forward`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .call_forms import HEADS, CallForm, call_forms
from .logits import PLAIN, Layout, Unreadable, described, pick, recognise

ROWS, LENGTH = 3, 7  # of a trial batch; B, T and V all differ


@dataclass(frozen=True)
class Forward:
    """The call that gave logits, and their layout."""

    call: CallForm
    layout: Layout
    vocab_size: int  # the last dimension of what came back when the model was loaded
    returns: str  # (Tensor [3, 7, 17], None)
    keep: int | None = None  # how many ids checks use, if the last one is for padding
    assumed: tuple[str, ...] = ()
    more: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)  # a causal mask if the model needs one
    mask_left_out: str = ""  # the argument by which the model would be causal, were it not left to the caller

    def raw(self, model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        return self.call.run(model, tokens, **{**self._added(tokens), **more})

    def beside(self, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
        """By name, what forward is given with these tokens."""
        return {**self.call.beside(tokens, model), **self._added(tokens)}

    def _added(self, tokens: Tensor) -> dict[str, Any]:
        return {name: make(tokens) for name, make in self.more.items()}

    def read(self, output: Any, B: int, T: int) -> Tensor:
        logits = pick(output, self.layout, B, T)
        return logits if self.keep is None else logits[..., :-1]

    def logits(self, model: nn.Module, tokens: Tensor, **more: Any) -> Tensor:
        """[B, T] to [B, T, V]. Raises Unreadable for an output without them."""
        return self.read(self.raw(model, tokens, **more), *tokens.shape)


class Uncallable(Exception):
    """No call gave logits; `attempts` has the errors, the most telling first."""

    def __init__(self, attempts: list[tuple[CallForm, Exception]]) -> None:
        super().__init__(str(attempts[0][1]) if attempts else "no way to call it")
        self.attempts = attempts


def find_forward(
    model: nn.Module, vocab_size: int | None, block_of: Callable[[nn.Module], int], device: Any, keep: int | None = None
) -> Forward:
    """Tries the call forms on a small batch. `block_of` gives a model's block size. Raises Uncallable."""
    length = min(LENGTH, block_of(model))
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(keep or vocab_size or 2, (ROWS, length), generator=generator).to(device)
    attempts: list[tuple[CallForm, Exception]] = []
    for form in call_forms(model, keep or vocab_size or 2, block_of):
        found = _attempt(model, form, tokens, vocab_size, keep, attempts)
        if found is not None:
            return found
    attempts.sort(key=lambda attempt: not isinstance(attempt[1], Unreadable))
    raise Uncallable(attempts)


def _attempt(
    model: nn.Module,
    form: CallForm,
    tokens: Tensor,
    vocab_size: int | None,
    keep: int | None,
    attempts: list[tuple[CallForm, Exception]],
) -> Forward | None:
    """One call form, or one made from it: with a head on hidden states, with one more token if one is dropped."""
    B, T = tokens.shape
    output = None
    try:
        with torch.no_grad():
            output = form.run(model, tokens)
        layout, logits = recognise(output, B, T, vocab_size)
        if logits.device.type != tokens.device.type:
            raise Unreadable(f"the logits are on {logits.device}, the tokens on {tokens.device}")
        for name in form.guessed:
            with torch.no_grad():
                other = form.run(model, tokens, **{name: (tokens + 1) % (keep or vocab_size or 2)})
            if not torch.equal(pick(other, layout, B, T), logits):
                raise Unreadable(f"forward requires {name}, and no check knows what it is")
    except Unreadable as problem:
        attempts.append((form, problem))
        if isinstance(output, Tensor) and output.dim() == 0 and not form.from_loss:
            return _attempt(model, _of_a_loss(form), tokens, vocab_size, keep, attempts)
        if problem.short:
            return _attempt(model, _one_more(form), tokens, vocab_size, keep, attempts)
        if problem.hidden and vocab_size is not None:
            for other in _with_head(model, form):
                if (found := _attempt(model, other, tokens, vocab_size, keep, attempts)) is not None:
                    return found
        return None
    except Exception as error:
        attempts.append((form, error))
        return None
    return Forward(
        form, layout, logits.shape[1] if layout.says == "[B, V, T]" else logits.shape[-1],
        described(output, {id(logits): "logits" if layout is PLAIN else f"logits {layout.says}"}), keep,
        assumed=(form.assumed,) if form.assumed else (),
    )  # fmt: skip


# -- call forms made from other call forms


def _one_more(form: CallForm) -> CallForm:
    """For a model that drops the last token of its input."""

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        return form.run(model, torch.cat((tokens, tokens[:, -1:]), dim=1), **more)

    assumed = "; ".join(filter(None, (form.assumed, "forward drops the last token: one is added before each call")))
    return replace(form, run=run, assumed=assumed)


class _LossInput(TorchFunctionMode):
    """Keeps the logits that the model passes to its loss."""

    logits: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (nn.functional.cross_entropy, nn.functional.nll_loss):
            self.logits = args[0] if args else (kwargs or {}).get("input")
        return function(*args, **(kwargs or {}))


def _of_a_loss(form: CallForm) -> CallForm:
    """For a model that returns only its loss."""

    def run(model: nn.Module, tokens: Tensor, **more: Any) -> Any:
        with _LossInput() as handed:
            loss = form.run(model, tokens, **more)
        if handed.logits is None:
            raise Unreadable(f"expected logits, got a loss ({described(loss)}): forward must return the logits as well")
        return handed.logits

    assumed = "forward returns only a loss: the logits are those that it is computed from"
    return replace(form, run=run, from_loss=True, assumed=assumed)


def _with_head(model: nn.Module, form: CallForm) -> Iterator[CallForm]:
    """For a model that returns hidden states and has a separate head."""
    for name in HEADS:
        if callable(getattr(model, name, None)):

            def run(model: nn.Module, tokens: Tensor, name: str = name, **more: Any) -> Any:
                output = form.run(model, tokens, **more)
                hidden = output["last_hidden_state"] if isinstance(output, dict) else output
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                return getattr(model, name)(hidden)

            yield replace(form, says=f"{name}({form.says})", run=run, assumed=f"{name} turns hidden states into logits")
