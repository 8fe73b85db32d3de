"""Models with a part switched off: a block bypassed, a head silenced. If nothing changes, the part is not used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable, farthest, note
from ..subject import EXISTENCE, Subject
from ..watch.calls import Call, each, recorded, tensors
from .influence import call, length, some_of
from .precision import precise, spread

FEW_TOKENS, SWEEPS = 4, 2.0  # for a model so large that not every part can be tried
SMALLEST = 1e-6  # standard deviations of the logits: a part that matters moves them by more (clean models: 0.1)

Forward = Callable[..., Any]
Wrap = Callable[[Forward], Forward]


def siblings(model: nn.Module) -> list[list[str]]:
    """Modules with parts of their own that stand in one list: blocks, heads, experts. Outermost first.

    Those in a Sequential or a ModuleDict belong together only if they are of one class.
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
    """The names of the model's blocks: the members of its outermost list of modules; empty without such a list."""
    return next(iter(siblings(model)), [])


@contextmanager
def replaced(module: nn.Module, wrap: Wrap) -> Iterator[None]:
    """The module with its forward wrapped (not hooked: some code calls forward directly)."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def passed_by(forward: Forward) -> Forward:
    """Returns the module's input in place of its first output that is new and has the input's shape.

    If none has that shape, zeros in place of the first that is new.
    """

    def instead(*args: Any, **kwargs: Any) -> Any:
        given, result, new = tensors((args, kwargs)), forward(*args, **kwargs), []

        def look(out: Tensor) -> Tensor:
            if out.is_floating_point() and not any(torch.equal(out, x) for x in given):  # else a residual stream, say
                new.append(out)
            return out

        each(result, look)
        alike = [out for out in new if given and out.shape == given[0].shape]  # rather than a cache beside the output
        first = next(iter(alike or new), None)
        return each(result, lambda out: out if out is not first else given[0] if alike else out * 0)

    return instead


def moves_another_output(subject: Subject, model: nn.Module, name: str, wrap: Wrap = passed_by) -> bool:
    """Whether wrapping the part changes any tensor that the model returns, such as the logits of a further head."""
    raw: list[Any] = []
    with model.register_forward_hook(lambda module, given, result: raw.append(tensors(result))):
        tokens = subject.tokens(2, length(subject), seed=subject.seed)
        call(subject, model, tokens)
        with replaced(model.get_submodule(name), wrap):
            call(subject, model, tokens)
    return any(one.shape != two.shape or farthest(one, two) > 0 for one, two in zip(*raw, strict=True))


@contextmanager
def left_alone(model: nn.Module, name: str, names: list[str]) -> Iterator[None]:
    """The model with only this block at work: the others run in their places, and their output is bypassed."""
    with ExitStack() as stack:
        for other in names:
            if other != name:
                stack.enter_context(replaced(model.get_submodule(other), passed_by))
        yield


def with_output(change: Callable[[Tensor], Tensor]) -> Wrap:
    """A wrapper that changes the tensor that a forward returns."""

    def wrap(forward: Forward) -> Forward:
        return lambda *args, **kwargs: change(forward(*args, **kwargs))

    return wrap


def with_input(change: Callable[[Tensor], Tensor]) -> Wrap:
    """A wrapper that changes the first argument of a forward."""

    def wrap(forward: Forward) -> Forward:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if args:
                return forward(change(args[0]), *args[1:], **kwargs)
            name = next(iter(kwargs))  # attention(query=x, key=x, value=x)
            return forward(**{**kwargs, name: change(kwargs[name])})

        return changed

    return wrap


def silenced(x: Tensor, *, H: int, h: int) -> Tensor:
    """The share of head h of H set to zero."""
    if not x.is_floating_point():
        return x  # ids: a tied table looks them up first, and projects later
    heads = torch.unflatten(x, -1, (H, -1)).clone()
    heads[..., h, :] = 0
    return heads.flatten(-2)


def exchanged(x: Tensor, *, H: int, h: int) -> Tensor:
    """Heads h and h + 1 of H swapped."""
    if not x.is_floating_point():
        return x
    order = [*range(h), h + 1, h, *range(h + 2, H)]
    return torch.unflatten(x, -1, (H, -1))[..., order, :].flatten(-2)


def head_projections(subject: Subject, model: nn.Module, H: int) -> list[str]:
    """Leaf modules with a matrix whose input is one vector of width n_embd per token, which H heads divide."""
    B, T = 2, length(subject)
    with recorded(model) as calls:
        call(subject, model, subject.tokens(B, T, seed=subject.seed))
    C = subject.sizes.n_embd

    def takes_heads(done: Call) -> bool:
        module = model if done.module == type(model).__name__ else model.get_submodule(done.module)
        matrix = any(p.dim() >= 2 for p in module.parameters(recurse=False))
        return matrix and any(x.shape[-1:] == (C,) and x.numel() == B * T * C for x in done.inputs[:1])

    return list(dict.fromkeys(done.module for done in calls if C % H == 0 and takes_heads(done)))


def block_projections(subject: Subject, model: nn.Module) -> list[tuple[str, int]]:
    """Leaf modules with a matrix inside the blocks that return one vector per token, and its width."""
    B, T = 2, length(subject)
    with recorded(model) as calls:
        call(subject, model, subject.tokens(B, T, seed=subject.seed))
    blocks = [f"{name}." for name in blocks_of(model)]
    found = {}
    for done in calls:
        if done.module.startswith(tuple(blocks)) and isinstance(done.result, Tensor):
            matrix = any(p.dim() >= 2 for p in model.get_submodule(done.module).parameters(recurse=False))
            if matrix and done.result.numel() == B * T * done.result.shape[-1]:
                found[done.module] = done.result.shape[-1]
    return list(found.items())


def head_trials(subject: Subject, H: int) -> dict[str, tuple[str, Wrap]]:
    """Each head silenced, then each two neighbours swapped, at the input of each projection; for `best_moves`."""
    trials: dict[str, tuple[str, Wrap]] = {}
    for name in head_projections(subject, subject.build(seed=subject.seed), H):
        for h in range(H):
            what = f"with head {h} of {H} silenced at the input of {name}"
            trials[what] = name, with_input(partial(silenced, H=H, h=h))
        for h in range(H - 1):
            what = f"with heads {h} and {h + 1} of {H} swapped at the input of {name}"
            trials[what] = name, with_input(partial(exchanged, H=H, h=h))
    return trials


def output_trials(subject: Subject, width: int) -> dict[str, tuple[str, Wrap]]:
    """Each head's width of each block projection's output silenced; for `best_moves`."""
    trials: dict[str, tuple[str, Wrap]] = {}
    for name, size in block_projections(subject, subject.build(seed=subject.seed)):
        for start in range(0, size - width + 1, width) if size % width == 0 else ():
            what = f"with outputs {start} to {start + width - 1} of {size} of {name} silenced"
            trials[what] = name, with_output(partial(silenced, H=size // width, h=start // width))
    return trials


def best_moves(subject: Subject, trials: dict[str, tuple[str, Wrap]]) -> dict[str, float]:
    """How far each trial, a module's name and a wrapper of its forward, moves the logits, in standard deviations.

    The largest move over the schemes of weights: one draw may hide what another shows. Of a large model, some of the
    trials, drawn by the seed, on a few tokens.
    """
    rows, T = 2, length(subject)
    if subject.affordable(rows * T, len(trials), sweeps=SWEEPS) < len(trials):
        rows, T = 1, min(T, FEW_TOKENS)
    chosen = some_of(list(trials), subject.affordable(rows * T, len(trials), sweeps=SWEEPS), seed=subject.seed)
    if len(chosen) < len(trials):
        note(sample=f"{len(chosen)} of {len(trials)} parts, drawn by the seed: the others were not looked at")
    best = dict.fromkeys(chosen, 0.0)
    tokens = subject.tokens(rows, T, seed=subject.seed)
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        want = call(subject, model, tokens)
        for what in chosen:
            name, wrap = trials[what]
            if best[what] <= SMALLEST:
                with replaced(model.get_submodule(name), wrap):
                    best[what] = max(best[what], farthest(call(subject, model, tokens), want) / spread(want))
    return best


def side_by_side(subject: Subject, model: nn.Module, names: list[str]) -> bool:
    """Whether these modules read the same tensor, as heads and experts do, and not one another's output."""
    with torch.no_grad(), recorded(model) as calls:
        subject.logits(model, subject.tokens(1, 2))
    read = {done.module: done.inputs[0] for done in reversed(calls) if done.module in names and done.inputs}
    first, *others = [*read.values()] or [torch.empty(0)]
    return bool(others) and all(torch.equal(first, other) for other in others)


def one_block(subject: Subject, scheme: tuple[float, float] | None, **sizes: Any) -> nn.Module:
    """The subject with a single block: built with one layer, or with the other blocks deleted from their list."""
    layers = dict(n_layer=1) if subject.can_vary("n_layer") else {}
    model = precise(subject, scheme, **layers, **sizes)
    for names in siblings(model)[:1]:
        if side_by_side(subject, model, names):  # the heads of the only block
            continue
        blocks = model.get_submodule(names[0].rpartition(".")[0])
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise NotApplicable("the blocks are not in a list, so none can be removed", blocks=names)
        del blocks[1:]
    try:
        with torch.no_grad():
            subject.logits(model, subject.tokens(1, 2))
    except Exception as error:
        raise NotApplicable(f"the model does not run with a single block: {error}") from None
    return model
