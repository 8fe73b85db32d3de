"""What every language model promises whatever it computes: shapes, lengths, ids, state, and no part without effect."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .expect import (
    SHAPE,
    NotApplicable,
    Where,
    advise,
    expect_close,
    expect_same,
    fail,
    farthest,
    first_offence,
    needs,
    note,
    place,
)
from .probes.ablation import exchanged, passed_by, replaced, siblings, silenced, with_input, with_output
from .probes.extra_arguments import POSITIONS, beside_tokens
from .probes.influence import TRAIN, call, every_id, length
from .probes.module_state import Held, buffers_kept, held_outside
from .probes.padding import SIDES, ragged
from .probes.precision import precise, precision, spread
from .probes.ties import expect_declared_tie, expect_no_twins, ties
from .subject import EXISTENCE, Subject
from .watch.calls import Call, first_bad, recorded
from .watch.location import locate

SMALLEST = 1e-6  # standard deviations of the logits: what a part that matters moves at least (clean models: 0.1)


def check_logits_have_shape(subject: Subject) -> None:
    """Token ids [B, T] give floating-point logits [B, T, V], whatever B and T."""
    model, V, longest = subject.build(seed=subject.seed), subject.sizes.vocab_size, length(subject)
    for B, T in ((3, longest), (1, longest), (longest, 2), (2, longest - 1), (1, 2)):
        tokens = subject.tokens(B, max(T, 1), seed=subject.seed)
        try:
            logits = call(subject, model, tokens)
        except Exception as error:
            if T == subject.sizes.block_size > 1:
                call(subject, model, tokens[:, 1:].contiguous())  # raises what is no matter of the length
                fail_unread(T, T, error)
            raise
        if tuple(logits.shape) != (B, max(T, 1), V):
            fail(
                f"{B} rows of {T} tokens gave logits of shape {list(logits.shape)}, expected {[B, T, V]}: "
                f"rows, positions, one number for each of the {V} symbols",
                likely=("logits-time-first", "logits-last-position-only"),
                advice="Print the shape after each step of the forward; the head is applied to [B, T, width].",
                got=list(logits.shape),
                expected=[B, T, V],
            )
        if not logits.is_floating_point():
            fail(
                f"the logits are {logits.dtype}: expected floating-point numbers",
                likely=("logits-rounded",),
                advice="Return the head's output itself: no argmax, no .long(), no .int().",
            )
    note(dtype=str(logits.dtype).removeprefix("torch."))


@needs(SHAPE)
def check_every_length_is_read(subject: Subject) -> None:
    """Every sequence from one token up to the block size is read, to logits at every position."""
    model, V = subject.build(seed=subject.seed), subject.sizes.vocab_size
    block = subject.sizes.block_size
    for T in [*range(1, length(subject) + 1), *([block - 1, block] if block > length(subject) else [])]:
        try:
            shape = tuple(call(subject, model, subject.tokens(2, T, seed=subject.seed)).shape)
        except Exception as error:
            if T == 1 and isinstance(error, ValueError | AssertionError):
                advise(f"a sequence of one token is refused: {error}")
                continue
            fail_unread(T, block, error)
        if shape != (2, T, V):
            fail(
                f"2 rows of {T} tokens gave logits of shape {list(shape)}, expected {[2, T, V]}",
                likely=("length-one-squeezed",),
                advice="Look for squeeze() without an axis, and for sizes written as numbers.",
                length=T,
            )


def fail_unread(T: int, block: int, error: Exception) -> NoReturn:
    likely = ("block-size-off-by-one", "length-one-squeezed")
    fail(
        f"a sequence of {T} tokens cannot be read, although the block size is {block}: {type(error).__name__}: {error}",
        likely=likely if T > 1 else likely[::-1],
        advice="Masks and position tables need block_size rows, of which the first T are taken.",
        length=T,
    )


@needs(SHAPE)
def check_logits_are_finite(subject: Subject) -> None:
    """Every symbol at every place, the first included, alone or all over, gives finite logits."""
    T, V = length(subject), subject.sizes.vocab_size
    everywhere = every_id(subject, T, seed=subject.seed)
    alone = torch.arange(min(V, 64), device=subject.device)[:, None]
    models = (subject.build(seed=subject.seed), "as initialized"), (precise(subject), "with large weights")
    for model, which in models:
        for tokens in (everywhere, alone.expand(-1, T).contiguous()):
            expect_finite(subject, model, tokens, which)


def expect_finite(subject: Subject, model: nn.Module, tokens: Tensor, which: str) -> None:
    logits = call(subject, model, tokens)
    bad = (~logits.isfinite()).nonzero()
    if len(bad):
        row, t, symbol = (int(i) for i in bad[0])
        every_first = not bool(bad[:, 1].any()) and len(bad[:, 0].unique()) == len(tokens)
        likely = ("mask-positive-inf", "first-token-masked-out", "causal-excludes-self")
        fail(
            f"the logit of symbol {symbol} at position {t} is {float(logits[row, t, symbol])} {which}, after "
            f"the tokens {tokens[row, : t + 1].tolist()}; {len(bad)} of {logits.numel()} logits are not finite",
            where=first_bad(model, lambda: call(subject, model, tokens), lambda x: bool(x.isnan().any())),
            likely=likely[::-1] if every_first else likely,
            advice="Print the scores before the softmax: each row needs at least one that is not -inf, and none +inf.",
            first={"t": t, "symbol": symbol},
            tokens=tokens[row].tolist(),
        )


@needs(SHAPE)
def check_earlier_calls_leave_no_trace(subject: Subject) -> None:
    """A call gives what it gave before to the bit, whatever was read in between: shorter, masked, in training."""
    T = length(subject)
    tokens = subject.tokens(3, T, seed=subject.seed)
    first = call(subject, precise(subject), tokens)
    for between, interlude in interludes(subject, T):

        def after(interlude: Callable[[nn.Module], Any] = interlude) -> nn.Module:
            model = precise(subject)
            interlude(model)
            return model

        expect_same(
            call(subject, after(), tokens),
            first,
            says=f"a fresh model and the same model after {between} give other logits: it remembers what it read",
            where=lambda after=after: first_difference(subject, precise(subject), after(), tokens),
            likely=likely_memories(between),
            advice="Look for attributes written in forward: a cache, a mask or a position counter kept on self.",
            between=between,
        )


def likely_memories(between: str) -> tuple[str, ...]:
    if "mask" in between:
        return ("mask-kept-from-the-first-call", "state-leaks-between-calls")
    named = {"a single token": "decoding-state-left-behind", "a backward pass in train mode": "backward-leaves-a-mark"}
    first = (named[between],) if between in named else ()
    return (*first, "state-leaks-between-calls", "eval-updates-running-statistics")


def interludes(subject: Subject, T: int) -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    """What may happen between two equal calls."""
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
    with suppress(ValueError, AssertionError):  # some refuse it, and say so
        call(subject, model, subject.tokens(1, 1, seed=subject.seed))


def read_in_half(subject: Subject, tokens: Tensor, model: nn.Module) -> None:
    """Some models, and some operations, cannot be autocast: nothing is said of them here."""
    with suppress(Exception), torch.autocast(subject.device.type, dtype=torch.bfloat16):
        call(subject, model, tokens)


def learn(subject: Subject, tokens: Tensor, model: nn.Module) -> None:
    """A backward pass, and no step."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), buffers_kept(model):
        subject.logits(model.train(), tokens).square().mean().backward()
    model.zero_grad(set_to_none=True)
    model.eval()


@needs(SHAPE)
def check_inputs_are_left_alone(subject: Subject) -> None:
    """Reading, in eval and in train mode with its backward, leaves all that was handed over bit for bit as it was."""
    T = length(subject)
    tokens = every_id(subject, T, seed=subject.seed)
    expect_left_alone(subject, tokens)
    for side in SIDES if subject.takes_mask else ():
        expect_left_alone(subject, tokens, "mask", ragged(len(tokens), T, side, seed=subject.seed))
    for name, value in beside_tokens(subject, tokens):
        expect_left_alone(subject, tokens, name, value)


def expect_left_alone(subject: Subject, tokens: Tensor, name: str = "", value: Tensor | None = None) -> None:
    """The tokens, and what is handed over beside them under this name."""
    beside = {} if value is None else {name: value.to(tokens.device)}
    for training in (False, True):
        given, more = tokens.clone(), {name: value.clone() for name, value in beside.items()}
        model = subject.build(seed=subject.seed).train(training)  # anew: a cache inside holds on to an earlier graph
        try:
            subject.logits(model, given, **more).sum().backward()
        except Exception:
            if name in ("", "mask"):
                raise  # else another shape of it may be wanted, or a loss have come back
        finally:
            model.eval()
        for what, before, after in (("tokens", tokens, given), *((n, beside[n], more[n]) for n in beside)):
            expect_unchanged(what, before, after)


def expect_unchanged(name: str, before: Tensor, after: Tensor) -> None:
    index = first_offence(after, before, 0)
    if index is None:
        return
    axes = ("row", "position")[-before.dim() :]
    likely = f"{name if name in ('tokens', 'mask') else 'targets'}-changed-in-place"
    fail(
        f"a forward changes the caller's own {name}: {place(index, axes)} was {before[index].item()} and is now "
        f"{after[index].item()}",
        likely=("position-ids-mutated-in-place" if POSITIONS.fullmatch(name) else likely,),
        advice="Look for operations in place (a trailing underscore, +=, x[i] = …) on an argument.",
        first=dict(zip(axes, index, strict=True)),
    )


@needs(SHAPE, "check_contract.check_every_length_is_read")
def check_too_long_a_sequence_is_no_silent_error(subject: Subject) -> None:
    """Beyond the block size there is an error, or the same logits as before for the tokens that fit."""
    if subject.longest is None:
        raise NotApplicable("the model has no limit of length that is known")
    model, block = precise(subject), subject.sizes.block_size
    tokens = subject.tokens(2, block + 2, seed=subject.seed)
    fits = call(subject, model, tokens[:, :block].contiguous())
    last = call(subject, model, tokens[:, -block:].contiguous())
    try:
        got = call(subject, model, tokens)
    except Exception as error:
        if not isinstance(error, ValueError | AssertionError):
            advise(
                f"a sequence beyond the block size raises {type(error).__name__}: {error}. A ValueError would say it"
            )
        return
    bound = precision(subject).bound(fits)
    if got.shape == last.shape and farthest(got, last) <= bound.size:
        advise(f"of a sequence beyond the block size only the last {block} tokens are read")
        return
    if got.shape[:2] != tokens.shape:
        fail(
            f"{block + 2} tokens, two beyond the block size, gave logits of shape {list(got.shape)} without an error",
            likely=("too-long-cut-silently",),
            advice="Raise a ValueError that names the length and the block size.",
            got=list(got.shape),
        )
    expect_close(
        got[:, :block],
        fits,
        bound=bound,
        says=f"{block + 2} tokens, two beyond the block size, are read without an error, and the logits of the first "
        f"{block} are not what they are without the two",
        likely=("too-long-read-wrong", "causal-hardcoded-length"),
        advice="Raise a ValueError that names the length and the block size.",
    )


@needs(SHAPE)
def check_unknown_token_ids_are_refused(subject: Subject) -> None:
    """A token id of the vocabulary size or more raises an error."""
    if subject.device.type != "cpu":
        raise NotApplicable("on an accelerator an index out of range kills the process", device=str(subject.device))
    model, V = subject.build(seed=subject.seed), subject.sizes.vocab_size
    accepted = [over for over in (V, V + 1, 2 * V, 64 * V) if reads_id(subject, model, over)]
    if accepted and max(accepted) < 64 * V:
        advise(f"token ids up to {max(accepted)} are read although the vocabulary size is {V}: the table is padded")
    elif accepted:
        fail(
            f"token id {V} is read without an error, and {max(accepted)} too, although the {V} ids are 0 to {V - 1}",
            likely=("token-ids-wrapped", "token-ids-clamped"),
            advice="Look up tokens in nn.Embedding as they are; a clamp or a modulo hides a tokenizer's mistake.",
            accepted=accepted,
        )
    if reads_id(subject, model, -1):
        advise("token id -1 is read as if it were the last symbol")


def reads_id(subject: Subject, model: nn.Module, token: int) -> bool:
    tokens = subject.tokens(2, length(subject), seed=subject.seed)
    tokens[1, 1] = token
    try:
        call(subject, model, tokens)
    except Exception:
        return False
    return True


@needs(SHAPE)
def check_every_tensor_is_registered(subject: Subject) -> None:
    """Every weight is a parameter of the model, and what else it holds follows it to another device."""
    model = subject.build(seed=subject.seed)
    outside = held_outside(model)
    for held in outside:
        if held.trainable:
            fail(
                f"{held.name} holds weights that are no parameters of the model: no optimizer sees them, no state_dict "
                "saves them, .to() leaves them behind",
                likely=("parameter-outside-module",),
                advice="Keep modules in nn.ModuleList or nn.ModuleDict, tensors in nn.Parameter or register_buffer.",
                name=held.name,
            )
    constants = [held for held in outside if isinstance(held.value, Tensor)]
    if constants and left_behind(subject, model, constants):
        fail(
            f"{constants[0].name} is a plain tensor that the forward reads: .to(device) leaves it behind, and the "
            "forward fails on the other device",
            likely=("buffer-not-registered",),
            advice="self.register_buffer(name, tensor, persistent=False) makes it follow the model.",
            names=[held.name for held in constants],
        )
    if constants:
        names = ", ".join(held.name for held in constants)
        advise(f"tensors outside parameters and buffers: {names}. A buffer would follow .to() and .double()")


def left_behind(subject: Subject, model: nn.Module, constants: list[Held]) -> bool:
    """Whether a forward on another device fails just because of these: the meta device, where nothing is computed."""

    def runs() -> bool:
        try:
            subject.logits(model, subject.tokens(2, length(subject)).to("meta"))
        except Exception:
            return False
        return True

    model.to("meta")
    if runs():
        return False
    for held in constants:
        held.set(held.value.to("meta"))
    return runs()


@needs(SHAPE)
def check_state_dict_restores_the_model(subject: Subject) -> None:
    """Saved, and loaded into a model from another seed, the weights give the same logits to the bit."""
    model, tokens = precise(subject), subject.tokens(3, length(subject), seed=subject.seed)
    other = precise(subject, None, seed=subject.seed + 1)
    want = call(subject, model, tokens)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location=subject.device)
    buffers = set(state) - set(other.state_dict()) - {name for name, _ in model.named_parameters()}
    if buffers:
        call(subject, other, tokens)
    try:
        other.load_state_dict(state)
    except Exception as error:
        fail(
            f"the model's own state_dict cannot be loaded into another instance: {type(error).__name__}: {error}",
            likely=("state-dict-does-not-load",),
            advice="Names and shapes in the state_dict may depend on the constructor's arguments alone.",
        )
    if buffers:
        advise(
            f"no new instance has {', '.join(sorted(buffers)[:4])}, made by the first call: it loads after one alone"
        )
    expect_same(
        call(subject, other, tokens),
        want,
        says="saved and loaded into another instance, the model gives other logits: something is not in its state_dict",
        where=lambda: first_difference(subject, model, other, tokens),
        likely=("init-reruns-after-load", "tied-weights-broken", "parameter-outside-module", "buffer-not-registered"),
        advice="Every tensor that decides the output must be a parameter or a persistent buffer.",
    )


def first_difference(subject: Subject, model: nn.Module, other: nn.Module, tokens: Tensor) -> Where | None:
    """The first module of two models of one architecture whose output differs although its inputs do not."""
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


@needs(SHAPE, "check_contract.check_state_dict_restores_the_model")
def check_copies_are_independent(subject: Subject) -> None:
    """A deep copy given other weights equals a model with those weights, and the original stays as it was."""
    model, other = precise(subject), precise(subject, seed=subject.seed + 1)
    tokens = subject.tokens(3, length(subject), seed=subject.seed)
    before, want = call(subject, model, tokens), call(subject, other, tokens)
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise NotApplicable(f"the model cannot be copied: {type(error).__name__}: {error}") from None
    copied.load_state_dict(other.state_dict())
    finding: dict[str, Any] = dict(
        likely=("copy-calls-the-original",),
        advice="Keep no bound methods, closures or modules in plain attributes: a copy still calls the original's.",
    )
    says = "a deep copy that was given the weights of another model does not compute as that one"
    expect_same(call(subject, copied, tokens), want, says=says, **finding)
    says = "giving a deep copy other weights changed what the original computes"
    expect_same(call(subject, model, tokens), before, says=says, **finding)


@needs(SHAPE)
def check_ties_survive(subject: Subject) -> None:
    """Shared weights are one parameter, and still one after loading, copying, converting and training steps."""
    model = subject.build(seed=subject.seed)
    expect_declared_tie(subject, model)
    expect_no_twins(model)
    tied = ties(model)
    note(tied=tied)
    for what, after in tie_trials(subject, model):
        lost = [names for names in tied if names not in ties(after)]
        if lost:
            fail(
                f"{' and '.join(lost[0])} are one parameter, but {what} they are two: from there on they drift apart",
                likely=("tied-weights-broken", "tie-lost-by-wrapping"),
                advice="Tie by one parameter, head.weight = embedding.weight, in the constructor; never by a copy.",
                names=lost[0],
            )


def tie_trials(subject: Subject, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model after whatever may part what is tied."""
    model.load_state_dict(subject.build(seed=subject.seed + 1).state_dict())
    yield "after load_state_dict", model
    try:
        yield "after copy.deepcopy", copy.deepcopy(model)
    except Exception as error:
        advise(f"the model cannot be copied: {type(error).__name__}: {error}")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        subject.logits(model.train(), subject.tokens(2, length(subject))).square().mean().backward()
        optimizer.step()
    yield "after two training steps", model.eval()
    yield "after .double()", model.double()


@needs(SHAPE, "check_contract.check_logits_are_finite")
def check_every_block_matters(subject: Subject) -> None:
    """Passing by any block, or silencing any of several heads kept in a list, changes the logits."""
    names = called_siblings(subject, subject.build(seed=subject.seed))
    if not names:
        raise NotApplicable("no two modules of one class stand in a list: nothing to leave out")
    moves = best_moves(subject, {name: (name, passed_by) for name in names})
    note(moves=moves, bound=SMALLEST)
    for name, move in moves.items():
        if move <= SMALLEST:
            model = subject.build(seed=subject.seed)
            fail(
                f"leaving out {name} moves the logits by {move:.3g} standard deviations, expected more than "
                f"{SMALLEST:.0e}: what it computes is thrown away",
                where=locate(model, name),
                likely=("block-output-discarded", "block-never-runs"),
                advice="Follow its output in the forward: it must be used, x = block(x), not block(x) alone.",
                module=name,
            )


def called_siblings(subject: Subject, model: nn.Module) -> list[str]:
    """The modules that repeat; fails for a block that never runs although its siblings do."""
    with recorded(model) as calls:
        call(subject, model, subject.tokens(2, length(subject), seed=subject.seed))
    ran = {done.module for done in calls}
    groups = siblings(model)
    for names in groups[:1]:
        idle = [name for name in names if name not in ran]
        if idle and len(idle) < len(names):
            fail(
                f"{idle[0]} never runs, although {names[0] if names[0] not in idle else names[-1]} does",
                where=locate(model, idle[0]),
                likely=("block-never-runs",),
                advice="Look at the loop over the blocks: its range, an early return, and whether x is passed on.",
                module=idle[0],
            )
    return [name for names in groups for name in names if name in ran]


@needs(SHAPE, "check_contract.check_every_block_matters")
def check_every_head_matters(subject: Subject) -> None:
    """Every head's share of what goes into a projection reaches the logits, and no two heads can be exchanged."""
    H = subject.sizes.n_head
    projections = head_projections(subject, subject.build(seed=subject.seed), H)
    if not projections:
        raise NotApplicable(f"no projection takes {H} heads side by side", n_head=H)
    trials = {}
    for name in projections:
        for h in range(H):
            what = f"with head {h} of {H} silenced on its way into {name}"
            trials[what] = name, with_input(partial(silenced, H=H, h=h))
        for h in range(H - 1):
            what = f"with heads {h} and {h + 1} of {H} exchanged on their way into {name}"
            trials[what] = name, with_input(partial(exchanged, H=H, h=h))
    expect_moves(subject, trials, likely=("last-head-dropped", "heads-all-alike", "gqa-heads-collapse-to-one"))


def head_projections(subject: Subject, model: nn.Module, H: int) -> list[str]:
    """Leaf modules with a matrix that take as many vectors as there are tokens, of the heads' common width."""
    B, T = 2, length(subject)
    with recorded(model) as calls:
        call(subject, model, subject.tokens(B, T, seed=subject.seed))
    C = subject.sizes.n_embd

    def takes_heads(done: Call) -> bool:
        module = model if done.module == type(model).__name__ else model.get_submodule(done.module)
        matrix = any(p.dim() >= 2 for p in module.parameters(recurse=False))
        return matrix and any(x.shape[-1:] == (C,) and x.numel() == B * T * C for x in done.inputs[:1])

    return list(dict.fromkeys(done.module for done in calls if C % H == 0 and takes_heads(done)))


@needs(SHAPE, "check_contract.check_every_head_matters")
def check_nothing_projected_is_thrown_away(subject: Subject) -> None:
    """Silencing any head's width of what a projection in a block gives changes the logits."""
    H, C = subject.sizes.n_head, subject.sizes.n_embd
    width = C // H
    trials = {}
    for name, size in block_projections(subject, subject.build(seed=subject.seed)):
        for start in range(0, size - width + 1, width) if size % width == 0 else ():
            what = f"with outputs {start} to {start + width - 1} of {size} of {name} silenced"
            trials[what] = name, with_output(partial(silenced, H=size // width, h=start // width))
    if not trials:
        raise NotApplicable("no projection in a block gives whole heads", n_head=H, n_embd=C)
    expect_moves(subject, trials, likely=("gqa-heads-collapse-to-one", "last-head-dropped"))


def block_projections(subject: Subject, model: nn.Module) -> list[tuple[str, int]]:
    """Leaf modules with a matrix inside the blocks that give one vector for every token, and its width."""
    B, T = 2, length(subject)
    with recorded(model) as calls:
        call(subject, model, subject.tokens(B, T, seed=subject.seed))
    blocks = [f"{name}." for names in siblings(model)[:1] for name in names]
    found = {}
    for done in calls:
        if done.module.startswith(tuple(blocks)) and isinstance(done.result, Tensor):
            matrix = any(p.dim() >= 2 for p in model.get_submodule(done.module).parameters(recurse=False))
            if matrix and done.result.numel() == B * T * done.result.shape[-1]:
                found[done.module] = done.result.shape[-1]
    return list(found.items())


def expect_moves(subject: Subject, trials: dict[str, tuple[str, Callable]], likely: tuple[str, ...]) -> None:
    moves = best_moves(subject, trials)
    note(least=min(moves.values()), bound=SMALLEST, tried=len(moves))
    for what, move in moves.items():
        if move <= SMALLEST:
            name = trials[what][0]
            fail(
                f"{what}, the logits move by {move:.3g} standard deviations, expected more than {SMALLEST:.0e}: "
                "what is computed there is thrown away",
                where=locate(subject.build(seed=subject.seed), name),
                likely=likely,
                advice="Follow what this part computes to the output: a slice, an index or a reshape leaves it out.",
                module=name,
            )


def best_moves(subject: Subject, trials: dict[str, tuple[str, Callable]]) -> dict[str, float]:
    """How far each change of one module's forward moves the logits, in their deviations: the best of the schemes."""
    best = dict.fromkeys(trials, 0.0)
    tokens = subject.tokens(2, length(subject), seed=subject.seed)
    for scheme in EXISTENCE:
        model = precise(subject, scheme)
        want = call(subject, model, tokens)
        for what, (name, wrap) in trials.items():
            if best[what] <= SMALLEST:
                with replaced(model.get_submodule(name), wrap):
                    best[what] = max(best[what], farthest(call(subject, model, tokens), want) / spread(want))
    return best
