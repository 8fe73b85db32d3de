"""Models with a part switched off: a block passed by, a head silenced. What then does not change was never used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..subject import Subject
from ..watch.calls import each, tensors
from .precision import precise


def siblings(model: nn.Module) -> list[list[str]]:
    """Modules with parts of their own that stand in one list: blocks, heads, experts. Outermost first.

    What stands in a Sequential or a ModuleDict belongs together only where it is of one class.
    """
    found = []
    for name, parent in model.named_modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            kinds: dict[Any, list[str]] = {}
            for child, module in parent.named_children():
                if any(True for _ in module.children()) and any(True for _ in module.parameters()):
                    kind = None if isinstance(parent, nn.ModuleList) else type(module)
                    kinds.setdefault(kind, []).append(f"{name}.{child}".lstrip("."))
            found += [names for names in kinds.values() if len(names) > 1]
    return found


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the model's blocks: what stands in the outermost list; none where nothing does."""
    return next(iter(siblings(model)), [])


@contextmanager
def replaced(module: nn.Module, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """The module with its forward wrapped: some code calls it directly."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def passed_by(forward: Callable) -> Callable:
    """The module's input instead of its first output that is new; zeros where their shapes differ."""

    def instead(*args: Any, **kwargs: Any) -> Any:
        given = tensors((args, kwargs))
        outputs = count()

        def first(out: Tensor) -> Tensor:
            handed_on = any(torch.equal(out, x) for x in given)  # among the streams of several blocks, say
            if not out.is_floating_point() or handed_on or next(outputs) > 0:
                return out
            return given[0] if given and given[0].shape == out.shape else out * 0

        return each(forward(*args, **kwargs), first)

    return instead


@contextmanager
def left_alone(model: nn.Module, name: str, names: list[str]) -> Iterator[None]:
    """The model with this one of the blocks at work: the others run, where they stand, and are passed by."""
    with ExitStack() as stack:
        for other in names:
            if other != name:
                stack.enter_context(replaced(model.get_submodule(other), passed_by))
        yield


def with_output(change: Callable[[Tensor], Tensor]) -> Callable[[Callable], Callable]:
    """A wrapper that changes the tensor that comes out."""

    def wrap(forward: Callable) -> Callable:
        return lambda *args, **kwargs: change(forward(*args, **kwargs))

    return wrap


def with_input(change: Callable[[Tensor], Tensor]) -> Callable[[Callable], Callable]:
    """A wrapper that changes the first tensor that goes in."""

    def wrap(forward: Callable) -> Callable:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if args:
                return forward(change(args[0]), *args[1:], **kwargs)
            name = next(iter(kwargs))  # attention(query=x, key=x, value=x)
            return forward(**{**kwargs, name: change(kwargs[name])})

        return changed

    return wrap


def silenced(x: Tensor, *, H: int, h: int) -> Tensor:
    """Zeros in the place of head h of H."""
    if not x.is_floating_point():
        return x  # ids: a tied table looks them up first, and projects later
    heads = x.unflatten(-1, (H, -1)).clone()
    heads[..., h, :] = 0
    return heads.flatten(-2)


def exchanged(x: Tensor, *, H: int, h: int) -> Tensor:
    """Heads h and h + 1 of H in each other's place."""
    if not x.is_floating_point():
        return x
    order = [*range(h), h + 1, h, *range(h + 2, H)]
    return x.unflatten(-1, (H, -1))[..., order, :].flatten(-2)


def one_block(subject: Subject, scheme: tuple[float, float] | None, **sizes: Any) -> nn.Module:
    """The subject with a single block, built so or with the others deleted from their list."""
    layers = dict(n_layer=1) if subject.can_vary("n_layer") else {}
    model = precise(subject, scheme, **layers, **sizes)
    for names in siblings(model)[:1]:
        blocks = model.get_submodule(names[0].rpartition(".")[0])
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise NotApplicable("the blocks have names: none of them can be left out", blocks=names)
        del blocks[1:]
    try:
        with torch.no_grad():
            subject.logits(model, subject.tokens(1, 2))
    except Exception as error:
        raise NotApplicable(f"the subject does not run with one block: {error}") from None
    return model
