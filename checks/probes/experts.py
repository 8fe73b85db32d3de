"""Mixtures of experts in any spelling: where they are, and which part of the output each expert has, measured.

Experts are sibling modules of one shape, or one tensor [E, …, …] per weight; the router is the product that gives E
scores per token. An expert's part is found by doubling what the expert gives; how it depends on the scores by adding to
these. Nothing is read from names, and nothing here judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..expect import NotApplicable, Where
from ..subject import EXISTENCE, Subject
from ..watch.calls import Call, each, recorded, tensors
from ..watch.draws import seeded
from ..watch.location import locate
from ..watch.operations import ADDED, TIMES
from ..ways import EVAL, Way
from .ablation import Forward, replaced, with_output
from .influence import call, length
from .module_state import set_mode
from .precision import precise

ROWS, LENGTH = 3, 6  # of the tokens that are routed
RAISED = 1e4  # added to a score, it leaves no other expert any part of a softmax
NUDGED = 1.0
MOST = 4  # experts of one token that are raised
MANY = 64  # experts: more are not tried one by one
NOTHING = 1e-6  # of the largest part: smaller is rounding

ROUTED = (  # advice
    "Take the router's softmax over the experts (dim=-1), and divide a token's weights by their own sum alone: "
    "weights / weights.sum(dim=-1, keepdim=True), with weights [tokens, top_k]."
)
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, StopIteration)

Dial = Callable[[int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Raised:
    """The parts [E, N, C] of all experts while every token's score of one expert, `column[n]`, is raised."""

    column: Tensor
    parts: Tensor

    @property
    def own(self) -> Tensor:
        """[N, C]: the part of the expert whose score was raised."""
        return self.parts[self.column, torch.arange(len(self.column))]


@dataclass(frozen=True)
class Mixture:
    """What was measured of one mixture of E experts on N tokens."""

    where: Where
    experts: list[str]  # what they are called
    scores: Tensor  # [N, E], as the router gives them
    parts: Tensor  # [E, N, C]
    raised: list[Raised]
    nudged: list[tuple[int, int, Tensor]]  # a token, the expert whose score it was raised by NUDGED, and the parts
    biases: dict[str, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)  # by name: as parts and raised parts
    firm: bool = False  # the highest score alone decides: no expert fills up, no vector of E numbers may outvote it
    given: list[int] = field(default_factory=list)  # how many tokens each expert was handed, where it is a module


def used(parts: Tensor) -> Tensor:
    """[E, N], True where an expert has a part of a token's output, by parts [E, N, C]."""
    sizes = parts.norm(dim=-1)
    return torch.gt(sizes, NOTHING * sizes.max())


def mixtures(subject: Subject) -> list[Mixture]:
    """The first and the last mixture of experts. Raises NotApplicable where none is found."""
    return subject.once(_measured)


def _measured(subject: Subject, /) -> list[Mixture]:
    held = candidates(subject.build(seed=subject.seed))
    if not held:
        raise NotApplicable("no mixture of experts was found: no equal modules or stacked weights with a router")
    model = precise(subject, EXISTENCE[1])
    tokens = subject.tokens(ROWS, min(LENGTH, length(subject)), seed=subject.seed)
    first = _calls(subject, model, tokens, EVAL)
    with torch.no_grad():
        from_the_front = _first(model, held, first)
        from_the_back = _first(model, held[::-1], first) if from_the_front is not None else None
    found = {m.where.module: m for m in (from_the_front, from_the_back) if m is not None}
    if not found:
        raise NotApplicable("equal modules or stacked weights were found, but no router that chooses among them")
    return list(found.values())


def _calls(subject: Subject, model: nn.Module, tokens: Tensor, way: Way) -> dict[str, Call]:
    """The first call of every module, by its name."""
    with recorded(model) as calls:
        call(subject, model, tokens, way=way)
    return {done.module: done for done in reversed(calls)}


def expect_room(subject: Subject, model: nn.Module, tokens: Tensor, way: Way, where: Where | None) -> None:
    """Raises NotApplicable where a mixture at this place passes some tokens by when all of them choose one expert.

    Whether an expert has room for a token then depends on the other tokens, by design (Fedus et al. 2021).
    """
    if where is None:
        return
    held = [
        (candidate, holder)
        for candidate in candidates(model)
        for holder in candidate.holders[:2]
        if f"{where.module}.".startswith(f"{holder}.")
    ]
    calls = _calls(subject, model, tokens, way) if held else {}
    set_mode(model, way.training)
    try:
        with torch.no_grad():
            full = [holder for candidate, holder in held if _is_full(model, candidate, holder, calls)]
    finally:
        set_mode(model, False)
    if full:
        raise NotApplicable(
            f"the experts of {full[0]} take a limited number of tokens: whether one has room depends on the others"
        )


def router_suspects(model: nn.Module, where: Where | None) -> tuple[str, ...]:
    """The known bugs of routers that mix tokens, if this place is the smallest module around a router's experts."""
    if where is None or all(where.module != one.holders[0] for one in candidates(model)):
        return ()
    return "router-normalised-over-tokens", "router-softmax-over-tokens"


def _is_full(model: nn.Module, held: Candidate, holder: str, calls: dict[str, Call]) -> bool:
    replay = _replay(model, held, holder, calls)
    dial = _dials(model, held, replay)[0] if replay is not None else None
    return replay is not None and dial is not None and _fills_up(replay, dial)


def _outvoted(module: nn.Module, E: int) -> bool:
    """Whether there may be biases of the choice alone, as DeepSeek-V3 has them; the bias of a product is none."""
    owners = (owner for owner in module.modules() if not isinstance(owner, nn.Linear))
    return any(t.shape == (E,) for owner in owners for t in (*owner.parameters(False), *owner.buffers(False)))


def _fills_up(replay: Replay, dial: Dial) -> bool:
    """Whether the first expert passes tokens by when all choose it, and takes each of them when it comes alone."""

    def served(crowd: Tensor) -> Tensor:
        """[N, C]: the part of the first expert, its score raised for the tokens of the crowd, lowered for others."""
        more = torch.zeros(replay.N, replay.E, dtype=torch.float64)
        more[:, 0] = torch.where(crowd, RAISED, -RAISED)
        once = replay(more)
        with dial(0):
            return replay(more) - once

    tokens = torch.arange(replay.N)
    of_all = served(tokens >= 0)
    room = (of_all != 0).any(-1).cpu()
    if bool(room.all()) or not bool(room.any()):
        return False
    one, other = int(room.nonzero()[0]), int((~room).nonzero()[0])
    alone, then = served(tokens == one)[one], served(tokens == other)[other]
    unchanged = (alone - of_all[one]).norm() <= 1e-4 * alone.norm()  # else its weight depends on others, not its room
    return bool(unchanged) and bool(then.any())


def _first(model: nn.Module, held: list[Candidate], calls: dict[str, Call]) -> Mixture | None:
    tried = (_measure(model, one, holder, calls) for one in held for holder in one.holders)
    return next((mixture for mixture in tried if mixture is not None), None)


@dataclass(frozen=True)
class Candidate:
    """A group of E modules or tensors, and the modules around it that hold a matrix with a side of E too."""

    names: list[str]  # of the modules; or of the module that holds the tensors, then
    stacked: list[str]  # the tensors' own names
    holders: list[str]  # the smallest first
    E: int


def candidates(model: nn.Module) -> list[Candidate]:
    """Groups that may be experts, by their shapes alone, in the order of the model's modules."""
    sides = {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() == 2}
    found: list[tuple[list[str], list[str], str, int]] = []
    for name, module in model.named_modules():
        children = dict(module.named_children()) if isinstance(module, nn.ModuleList | nn.ModuleDict) else {}
        if len(children) > 1 and len({_shapes(child) for child in children.values()}) == 1:
            members = [f"{name}.{child}".lstrip(".") for child in children]
            found.append((members, [], name.rpartition(".")[0], len(members)))
        stacks = {key: p for key, p in module._parameters.items() if p is not None and p.dim() > 1}
        for E in sorted({p.shape[0] for p in stacks.values() if p.dim() == 3 and p.shape[0] > 1}):
            found.append(([name], [key for key, p in stacks.items() if p.shape[0] == E], name, E))
    return [
        Candidate(members, stacked, holders, E)
        for members, stacked, inner, E in found
        if E <= MANY and (holders := _holders(inner, members, E, sides, bool(stacked)))
    ]


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    shapes = [tuple(p.shape) for p in module.parameters()]
    return (type(module), *shapes) if shapes else (id(module),)


def _holders(inner: str, members: list[str], E: int, sides: dict[str, tuple[int, ...]], stacked: bool) -> list[str]:
    inside = () if stacked else tuple(f"{member}." for member in members)
    routers = [name for name, shape in sides.items() if E in shape and not name.startswith(inside)]
    around = []
    while inner:
        if any(name.startswith(f"{inner}.") for name in routers):
            around.append(inner)
        inner = inner.rpartition(".")[0]
    return around


class Scores(TorchFunctionMode):
    """Finds the products that give E scores for each of N tokens; adds `more` [N, E] to those of one of them."""

    def __init__(self, N: int, E: int, site: int = -1, more: Tensor | None = None) -> None:
        super().__init__()
        self.N, self.E, self.site, self.more = N, E, site, more
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.scores(func, args, kwargs or {}, result):
            return result
        self.seen.append(result.detach().reshape(-1, self.E))
        if len(self.seen) - 1 != self.site or self.more is None:
            return result
        return result + self.more.view(result.shape).to(result)

    def scores(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        if func is not F.linear and func not in TIMES and func not in ADDED and func is not torch.einsum:
            return False
        if not isinstance(result, Tensor) or result.shape[-1:] != (self.E,) or result.numel() != self.N * self.E:
            return False
        operands = args[1] if func is torch.einsum and isinstance(args[1], list | tuple) else args
        given = [a for a in (*operands, *kwargs.values()) if isinstance(a, Tensor)]
        return any(a.dim() == 2 and self.E in a.shape for a in given)


class Replay:
    """One module that is run again on the input that it had: [N, C] out, with scores and experts changed."""

    def __init__(self, module: nn.Module, done: Call, E: int) -> None:
        self.module, self.done, self.E, self.site = module, done, E, -1
        x = next(t for t in done.inputs if t.dim() > 1)
        self.N, self.C = x.numel() // x.shape[-1], x.shape[-1]
        self.seen: list[Tensor] = []

    def __call__(self, more: Tensor | None = None) -> Tensor:
        args, kwargs = each((self.done.args, self.done.kwargs), torch.clone)
        scores = Scores(self.N, self.E, self.site, more)
        with scores, seeded(0):
            given = tensors(self.module(*args, **kwargs))
        self.seen = scores.seen
        out = next(t for t in given if t.numel() == self.N * self.C)
        return out.reshape(self.N, self.C).nan_to_num(0.0, 0.0, 0.0)  # an extreme score may leave 0 of 0

    def parts(self, dial: Dial, more: Tensor | None = None) -> Tensor:
        """[E, N, C]: what doubling each expert adds to the output."""
        whole = self(more)
        found = []
        for e in range(self.E):
            with dial(e):
                found.append(self(more) - whole)
        return torch.stack(found).cpu()


def _replay(model: nn.Module, held: Candidate, holder: str, calls: dict[str, Call]) -> Replay | None:
    """None where it turns out to be no mixture: no scores that change the output."""
    done = calls.get(holder)
    if done is None or not any(t.dim() > 1 for t in done.inputs):
        return None
    try:
        replay = Replay(model.get_submodule(holder), done, held.E)
        whole = replay()
        for site in range(len(replay.seen)):
            replay.site = site
            if _moves(replay, whole):
                return replay
    except REFUSALS:
        pass
    return None


def _measure(model: nn.Module, held: Candidate, holder: str, calls: dict[str, Call]) -> Mixture | None:
    replay = _replay(model, held, holder, calls)
    try:
        return None if replay is None else _routed(model, held, holder, replay)
    except REFUSALS:
        return None


def _moves(replay: Replay, whole: Tensor) -> bool:
    more = whole.new_zeros(replay.N, replay.E)
    more[torch.arange(replay.N), torch.arange(replay.N) % replay.E] = RAISED
    return bool((replay(more) - whole).abs().max() > NOTHING * whole.abs().max())


def _routed(model: nn.Module, held: Candidate, holder: str, replay: Replay) -> Mixture | None:
    dial, biases = _dials(model, held, replay)
    if dial is None:
        return None
    parts, scores = replay.parts(dial), replay.seen[replay.site].cpu()
    columns = _columns(parts)
    if not _in_order(replay, columns[-1]):
        return None
    bumps = [_at(replay, column, RAISED) for column in columns]
    raised = [Raised(column, replay.parts(dial, bump)) for column, bump in zip(columns, bumps, strict=True)]
    nudged = []
    for n in (0, replay.N // 2):
        e = int(parts[:, n].norm(dim=-1).argmax())
        more = parts.new_zeros(replay.N, replay.E)
        more[n, e] = NUDGED
        nudged.append((n, e, replay.parts(dial, more)))
    of_biases = {name: (replay.parts(b), [replay.parts(b, bump) for bump in bumps]) for name, b in biases.items()}
    names = held.names if not held.stacked else [f"{held.names[0]}[{e}]" for e in range(held.E)]
    firm = not _outvoted(replay.module, held.E) and not _fills_up(replay, dial)
    given = [] if held.stacked else _given([model.get_submodule(name) for name in held.names], replay)
    found = Mixture(locate(model, holder), names, scores, parts, raised, nudged, of_biases, firm, given)
    return found if _chooses(found) else None


def _given(members: list[nn.Module], replay: Replay) -> list[int]:
    rows = [0] * len(members)

    def counting(e: int, forward: Forward) -> Forward:
        def counted(*args: Any, **kwargs: Any) -> Any:
            x = tensors((args, kwargs))[0]
            rows[e] += x.numel() // x.shape[-1]
            return forward(*args, **kwargs)

        return counted

    with ExitStack() as stack:
        for e, member in enumerate(members):
            stack.enter_context(replaced(member, partial(counting, e)))
        replay()
    return rows


def _in_order(replay: Replay, column: Tensor) -> bool:
    """Whether the router's rows are the output's: in code that turns axes around, they may stand in another order."""
    whole = replay()
    for n in (0, replay.N // 2):
        more = torch.zeros(replay.N, replay.E, dtype=torch.float64)
        more[n, column[n]] = RAISED
        moved = (replay(more) - whole).abs().amax(-1) > NOTHING * whole.abs().max()
        if bool(moved.any()) and not bool(moved[n]):
            return False
    return True


def _chooses(found: Mixture) -> bool:
    """Whether some tokens leave some members out, and use some: heads, and layers, are all at work for each."""
    for parts in (found.parts, *(raised.parts for raised in found.raised)):
        at_work = used(parts)
        if bool(at_work.any()) and not bool(at_work.all()):
            return True
    return False


def _columns(parts: Tensor) -> list[Tensor]:
    """For each token one of its experts, the largest part first, as often as tokens have several; then another."""
    sizes = parts.norm(dim=-1)  # [E, N]
    order = sizes.argsort(dim=0, descending=True)
    most = int((sizes > NOTHING * sizes.max()).sum(0).max())
    rounds = [order[j] for j in range(min(max(most, 1), MOST))]
    return (
        rounds
        if most >= len(parts)
        else [*rounds, order[most:][torch.arange(parts.shape[1]) % (len(parts) - most), torch.arange(parts.shape[1])]]
    )


def _at(replay: Replay, column: Tensor, size: float) -> Tensor:
    more = torch.zeros(replay.N, replay.E, dtype=torch.float64)
    more[torch.arange(replay.N), column] = size
    return more


def _dials(model: nn.Module, held: Candidate, replay: Replay) -> tuple[Dial | None, dict[str, Dial]]:
    """What doubles an expert's part, and what doubles its last bias where that is a tensor of its own."""
    if not held.stacked:
        members = [model.get_submodule(name) for name in held.names]
        twice = with_output(lambda out: each(out, lambda t: t * 2))
        return lambda e: replaced(members[e], twice), {}
    holder = model.get_submodule(held.names[0])
    tensors = {name: getattr(holder, name) for name in held.stacked}
    linear = {name: p for name, p in tensors.items() if _linear(p, replay)}
    matrices = [p for p in linear.values() if p[0].numel() > max(p.shape[1:])]
    vectors = {name: p for name, p in linear.items() if p[0].numel() == max(p.shape[1:])}
    if not matrices:
        return None, {}
    return partial(_doubled, matrices[-1]), {name: partial(_doubled, p) for name, p in vectors.items()}


def _linear(parameter: nn.Parameter, replay: Replay) -> bool:
    """Whether the output goes straight with the tensor as a whole, as it does with a last weight or bias."""
    outs = [replay()]
    for factor in (2.0, 3.0):
        with _scaled(parameter, slice(None), factor):
            outs.append(replay())
    one, two = outs[1] - outs[0], outs[2] - outs[0]
    size = float(one.abs().max())
    return size > NOTHING * float(outs[0].abs().max()) and float((two - 2 * one).abs().max()) < 1e-4 * size


def _doubled(parameter: nn.Parameter, e: int) -> AbstractContextManager[Any]:
    return _scaled(parameter, e, 2.0)


@contextmanager
def _scaled(parameter: nn.Parameter, index: Any, factor: float) -> Iterator[None]:
    before = parameter.data[index].clone()
    parameter.data[index] = before * factor
    try:
        yield
    finally:
        parameter.data[index] = before
