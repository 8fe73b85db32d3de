"""What every language model must fulfil: shapes, lengths, ids, no hidden state, and no part without effect."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .expect import (
    SHAPE,
    NotApplicable,
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
from .probes.ablation import (
    SMALLEST,
    Wrap,
    best_moves,
    head_trials,
    moves_another_output,
    output_trials,
    passed_by,
    siblings,
)
from .probes.between_calls import expect_no_trace_of_a_longer_text, first_difference, interludes
from .probes.extra_arguments import POSITIONS, beside_tokens
from .probes.influence import call, every_id, length, some_of
from .probes.module_state import (
    expect_declared_tie,
    expect_no_twins,
    held_outside,
    left_behind,
    tie_trials,
    ties,
)
from .probes.padding import SIDES, ragged
from .probes.precision import precise, precision
from .subject import Subject
from .watch.calls import first_bad, recorded
from .watch.location import locate


def check_logits_have_shape(subject: Subject) -> None:
    """Token ids [B, T] must give floating-point logits [B, T, V], for any B and T."""
    model, V, longest = subject.build(seed=subject.seed), subject.sizes.vocab_size, length(subject)
    for B, T in ((3, longest), (1, longest), (longest, 2), (2, longest - 1), (1, 2)):
        tokens = subject.tokens(B, max(T, 1), seed=subject.seed)
        try:
            logits = call(subject, model, tokens)
        except Exception as error:
            if T == subject.sizes.block_size > 1:
                call(subject, model, tokens[:, 1:].contiguous())  # raises if the length is not to blame
                fail_unread(T, T, error)
            raise
        if tuple(logits.shape) != (B, max(T, 1), V):
            fail(
                f"{B} rows of {T} tokens gave logits of shape {list(logits.shape)}, expected {[B, T, V]}: "
                f"rows, positions, one logit for each of the {V} token ids",
                likely=("logits-time-first", "logits-last-position-only"),
                advice="Print the shape after each step of the forward; the head must be applied to [B, T, width].",
                got=list(logits.shape),
                expected=[B, T, V],
            )
        if not logits.is_floating_point():
            fail(
                f"the logits are {logits.dtype}, expected floating-point numbers",
                likely=("logits-rounded",),
                advice="Return the head's output itself, without argmax, .long() or .int().",
            )
    note(dtype=str(logits.dtype).removeprefix("torch."))


@needs(SHAPE)
def check_every_length_is_read(subject: Subject) -> None:
    """The model must read every length from one token to the block size and return logits at every position."""
    model, V = subject.build(seed=subject.seed), subject.sizes.vocab_size
    block = subject.sizes.block_size
    if subject.padded_up:
        says = f"forward fails for every text that is not exactly {block} tokens long"
        advise(f"{says}: shorter ones were padded on the right for all checks. Is that how your callers use it?")
        raise NotApplicable(f"{says}, so only that length was read")
    for T in [*range(1, length(subject) + 1), *([block - 1, block] if block > length(subject) else [])]:
        try:
            shape = tuple(call(subject, model, subject.tokens(2, T, seed=subject.seed)).shape)
        except Exception as error:
            if T == 1 and isinstance(error, ValueError | AssertionError):
                advise(f"the model refuses a sequence of one token: {error}")
                continue
            fail_unread(T, block, error)
        if shape != (2, T, V):
            fail(
                f"2 rows of {T} tokens gave logits of shape {list(shape)}, expected {[2, T, V]}",
                likely=("length-one-squeezed",),
                advice="Look for squeeze() without an axis, and for hard-coded sizes.",
                length=T,
            )


def fail_unread(T: int, block: int, error: Exception) -> NoReturn:
    likely = ("block-size-off-by-one", "length-one-squeezed")
    fail(
        f"a sequence of {T} tokens fails, although the block size is {block}: {type(error).__name__}: {error}",
        likely=likely if T > 1 else likely[::-1],
        advice="Make masks and position tables with block_size rows, and take the first T of them.",
        length=T,
    )


@needs(SHAPE)
def check_logits_are_finite(subject: Subject) -> None:
    """Every token id must give finite logits at every position, in mixed rows and in rows of that id only."""
    T, V = length(subject), subject.sizes.vocab_size
    everywhere = every_id(subject, T, seed=subject.seed)
    ids = some_of(list(range(min(V, 64))), subject.affordable(T, 64), seed=subject.seed)
    alone = torch.tensor(ids, device=subject.device)[:, None]
    models = (subject.build(seed=subject.seed), "weights as initialized"), (precise(subject), "large weights")
    for model, which in models:
        for tokens in (everywhere, alone.expand(-1, T).contiguous()):
            expect_finite(subject, model, tokens, which)


def expect_finite(subject: Subject, model: nn.Module, tokens: Tensor, which: str) -> None:
    logits = call(subject, model, tokens)
    bad = (~logits.isfinite()).nonzero()
    if len(bad):
        row, t, symbol = (int(i) for i in bad[0])
        every_first = not bool(bad[:, 1].any()) and torch.unique(bad[:, 0]).numel() == len(tokens)
        likely = ("mask-positive-inf", "first-token-masked-out", "causal-excludes-self")
        fail(
            f"the logit for token id {symbol} at position {t} is {float(logits[row, t, symbol])} ({which}) after "
            f"the tokens {tokens[row, : t + 1].tolist()}; {len(bad)} of {logits.numel()} logits are not finite",
            where=first_bad(model, lambda: call(subject, model, tokens), lambda x: bool(x.isnan().any())),
            likely=likely[::-1] if every_first else likely,
            advice="Print the scores before the softmax: each row must have one above -inf, and none at +inf.",
            first={"t": t, "symbol": symbol},
            tokens=tokens[row].tolist(),
        )


@needs(SHAPE)
def check_earlier_calls_leave_no_trace(subject: Subject) -> None:
    """A call must give the same logits bit for bit, whatever the model read before: shorter, masked, in training."""
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
            says=f"after {between} the model gives different logits from a fresh model: it keeps state between calls",
            where=lambda after=after: first_difference(subject, precise(subject), after(), tokens),
            likely=likely_memories(between),
            advice="Look for attributes that forward writes: a cache, a mask or a position counter kept on self.",
            between=between,
        )
    expect_no_trace_of_a_longer_text(subject)


def likely_memories(between: str) -> tuple[str, ...]:
    if "mask" in between:
        return ("mask-kept-from-the-first-call", "state-leaks-between-calls")
    named = {"a single token": "decoding-state-left-behind", "a backward pass in train mode": "backward-leaves-a-mark"}
    first = (named[between],) if between in named else ()
    return (*first, "state-leaks-between-calls", "eval-updates-running-statistics")


@needs(SHAPE)
def check_inputs_are_left_alone(subject: Subject) -> None:
    """A forward must not change the tensors that are passed to it, in eval mode or in a training step."""
    T = length(subject)
    tokens = every_id(subject, T, seed=subject.seed)
    tokens = tokens[: subject.affordable(3 * T, len(tokens))]  # each is read with a backward pass
    expect_left_alone(subject, tokens)
    tokens = tokens[: subject.affordable(3 * T, len(tokens), sweeps=0.25)]
    for side in SIDES if subject.takes_mask else ():
        expect_left_alone(subject, tokens, "mask", ragged(len(tokens), T, side, seed=subject.seed))
    for name, value in beside_tokens(subject, tokens):
        expect_left_alone(subject, tokens, name, value)


def expect_left_alone(subject: Subject, tokens: Tensor, name: str = "", value: Tensor | None = None) -> None:
    """The tokens, and the argument of this name passed with them."""
    beside: dict[str, Tensor] = {} if value is None else {name: value.to(tokens.device)}
    for training in (False, True):
        given = tokens.clone()
        more: dict[str, Any] = {name: value.clone() for name, value in beside.items()}
        model = subject.build(seed=subject.seed).train(training)  # a new one: a cache inside may keep an earlier graph
        # Through the whole model, but without the gradients of a large one's matrices, which fill the memory.
        vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2] if subject.large else []
        try:
            torch.autograd.backward(subject.logits(model, given, **more).sum(), inputs=vectors or None)
        except Exception:
            if name in ("", "mask"):
                raise  # otherwise the model may expect another shape, or have returned a loss
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
        advice="Look for in-place operations on an argument (a trailing underscore, +=, x[i] = …).",
        first=dict(zip(axes, index, strict=True)),
    )


@needs(SHAPE, "check_contract.check_every_length_is_read")
def check_too_long_a_sequence_is_no_silent_error(subject: Subject) -> None:
    """A sequence beyond the block size must raise an error, or leave the logits of the tokens that fit unchanged."""
    if subject.longest is None:
        raise NotApplicable("no limit on the sequence length is known")
    model, block = precise(subject), max(subject.longest, subject.sizes.block_size)
    tokens = subject.tokens(subject.affordable(block, 2), block + 2, seed=subject.seed)
    try:
        got = call(subject, model, tokens)
    except Exception as error:
        if not isinstance(error, ValueError | AssertionError):
            advise(
                f"a sequence beyond the block size raises {type(error).__name__}: {error}. A ValueError naming the "
                f"limit ({block}) would be clearer"
            )
        return
    fits = call(subject, model, tokens[:, :block].contiguous())
    last = call(subject, model, tokens[:, -block:].contiguous())
    bound = precision(subject).bound(fits)
    if got.shape == last.shape and farthest(got, last) <= bound.size:
        advise(f"only the last {block} tokens of a sequence beyond the block size are read")
        return
    shorter = call(subject, model, tokens[:, : block - 2].contiguous()) if block > 3 else fits
    if farthest(shorter, fits[:, : shorter.shape[1]]) > bound.size:
        raise NotApplicable(
            f"among texts that fit, too, the first {block - 2} tokens get other logits alone than with two more: see "
            "check_prefix_gives_the_same_logits"
        )
    if got.shape[:2] != tokens.shape:
        fail(
            f"{block + 2} tokens, two more than the block size, give logits of shape {list(got.shape)} and no error",
            likely=("too-long-cut-silently",),
            advice="Raise a ValueError that names the length and the block size.",
            got=list(got.shape),
        )
    expect_close(
        got[:, :block],
        fits,
        bound=bound,
        says=f"{block + 2} tokens, two more than the block size, raise no error, but the first {block} get different "
        "logits than without the last two",
        likely=("too-long-read-wrong", "causal-hardcoded-length"),
        advice="Raise a ValueError that names the length and the block size.",
    )


@needs(SHAPE)
def check_unknown_token_ids_are_refused(subject: Subject) -> None:
    """A token id equal to the vocabulary size or larger must raise an error."""
    if subject.device.type != "cpu":
        raise NotApplicable("on an accelerator an index out of range kills the process", device=str(subject.device))
    model, V = subject.build(seed=subject.seed), subject.sizes.vocab_size
    accepted = [over for over in (V, V + 1, 2 * V, 64 * V) if reads_id(subject, model, over)]
    if accepted and max(accepted) < 64 * V:
        advise(f"token ids up to {max(accepted)} are accepted although the vocabulary size is {V}: the table is padded")
    elif accepted:
        fail(
            f"token id {V} is accepted without an error, and so is {max(accepted)}; valid ids are 0 to {V - 1}",
            likely=("token-ids-wrapped", "token-ids-clamped"),
            advice="Pass token ids to nn.Embedding unchanged: a clamp or a modulo hides mistakes of the tokenizer.",
            accepted=accepted,
        )
    if reads_id(subject, model, -1):
        advise("token id -1 is accepted and read as the last token id")


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
    """Every weight must be a parameter of the model, and its other tensors must move with it to another device."""
    model = subject.build(seed=subject.seed)
    outside = held_outside(model)
    for held in outside:
        if held.trainable:
            fail(
                f"{held.name} holds weights that are not parameters of the model: no optimizer sees them, no "
                "state_dict saves them, and .to() leaves them behind",
                likely=("parameter-outside-module",),
                advice="Keep modules in nn.ModuleList or nn.ModuleDict, tensors in nn.Parameter or register_buffer.",
                name=held.name,
            )
    constants = [held for held in outside if isinstance(held.value, Tensor)]

    def read() -> Tensor:
        return subject.logits(model, subject.tokens(2, length(subject)).to("meta"))

    if constants and left_behind(model, constants, read):
        fail(
            f"{constants[0].name} is a plain tensor that the forward reads: .to(device) leaves it behind, and the "
            "forward then fails on the other device",
            likely=("buffer-not-registered",),
            advice="Register it: self.register_buffer(name, tensor, persistent=False) makes it move with the model.",
            names=[held.name for held in constants],
        )
    if constants:
        names = ", ".join(held.name for held in constants)
        advise(f"{names}: neither parameters nor buffers; as buffers these tensors would follow .to() and .double()")


@needs(SHAPE)
def check_state_dict_restores_the_model(subject: Subject) -> None:
    """Saved weights loaded into a model built from another seed must give the same logits bit for bit."""
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
            advice="Make names and shapes in the state_dict depend only on the constructor's arguments.",
        )
    if buffers:
        advise(
            f"{', '.join(sorted(buffers)[:4])}: made by the first call, so a new instance loads this state_dict only "
            "after a call"
        )
    expect_same(
        call(subject, other, tokens),
        want,
        says="saved and loaded into another instance, the model gives different logits: something is not in its "
        "state_dict",
        where=lambda: first_difference(subject, model, other, tokens),
        likely=("init-reruns-after-load", "tied-weights-broken", "parameter-outside-module", "buffer-not-registered"),
        advice="Make every tensor that affects the output a parameter or a persistent buffer.",
    )


@needs(SHAPE, "check_contract.check_state_dict_restores_the_model")
def check_copies_are_independent(subject: Subject) -> None:
    """A deep copy given other weights must equal a model with those weights and leave the original unchanged."""
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
        advice="Keep no bound methods or closures in attributes: in a copy they still call the original.",
    )
    says = "a deep copy with the weights of another model gives different logits from that model"
    expect_same(call(subject, copied, tokens), want, says=says, **finding)
    says = "loading other weights into a deep copy changes the logits of the original"
    expect_same(call(subject, model, tokens), before, says=says, **finding)


@needs(SHAPE)
def check_ties_survive(subject: Subject) -> None:
    """Tied weights must be one parameter, and still be one after loading, copying, converting and training steps."""
    model = subject.build(seed=subject.seed)
    expect_declared_tie(subject, model)
    expect_no_twins(model)
    tied = ties(model)
    note(tied=tied)
    for what, after in tie_trials(subject, model, length(subject)):
        lost = [names for names in tied if names not in ties(after)]
        if lost:
            fail(
                f"{' and '.join(lost[0])} are one parameter, but {what} they are two, which training moves apart",
                likely=("tied-weights-broken", "tie-lost-by-wrapping"),
                advice="Tie in the constructor by sharing a parameter, head.weight = embedding.weight, not by a copy.",
                names=lost[0],
            )


@needs(SHAPE, "check_contract.check_logits_are_finite")
def check_every_block_matters(subject: Subject) -> None:
    """Bypassing any block, or any head or expert kept in a list, must change the logits."""
    names = called_siblings(subject, subject.build(seed=subject.seed))
    if not names:
        raise NotApplicable("no list of several blocks, heads or experts was found")
    moves = best_moves(subject, {name: (name, passed_by) for name in names})
    note(moves=moves, bound=SMALLEST)
    for name, move in moves.items():
        if move <= SMALLEST:
            model = subject.build(seed=subject.seed)
            if moves_another_output(subject, model, name):  # a further head's
                continue
            fail(
                f"leaving out {name} moves the logits by {move:.3g} standard deviations, expected more than "
                f"{SMALLEST:.0e}: its output is not used",
                where=locate(model, name),
                likely=("block-output-discarded", "block-never-runs"),
                advice="Follow its output in the forward: write x = block(x), not block(x) alone.",
                module=name,
            )


def called_siblings(subject: Subject, model: nn.Module) -> list[str]:
    """The repeated modules that run; fails for a block that never runs although its siblings do."""
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
                advice="Check the loop over the blocks: its range, an early return, and whether x is passed on.",
                module=idle[0],
            )
    return [name for names in groups for name in names if name in ran]


@needs(SHAPE, "check_contract.check_every_block_matters")
def check_every_head_matters(subject: Subject) -> None:
    """Silencing any head, or swapping two, at the input of a projection must change the logits."""
    H = subject.sizes.n_head
    trials = head_trials(subject, H)
    if not trials:
        raise NotApplicable(f"no projection was found whose input is {H} heads side by side", n_head=H)
    expect_moves(subject, trials, likely=("last-head-dropped", "heads-all-alike", "gqa-heads-collapse-to-one"))


@needs(SHAPE, "check_contract.check_every_head_matters")
def check_nothing_projected_is_thrown_away(subject: Subject) -> None:
    """Silencing any head's share of a projection's output inside a block must change the logits."""
    H, C = subject.sizes.n_head, subject.sizes.n_embd
    trials = output_trials(subject, C // H)
    if not trials:
        raise NotApplicable("no projection inside a block has whole heads as its output", n_head=H, n_embd=C)
    expect_moves(subject, trials, likely=("gqa-heads-collapse-to-one", "last-head-dropped"))


def expect_moves(subject: Subject, trials: dict[str, tuple[str, Wrap]], likely: tuple[str, ...]) -> None:
    moves = best_moves(subject, trials)
    note(least=min(moves.values()), bound=SMALLEST, tried=len(moves))
    for what, move in moves.items():
        if move <= SMALLEST:
            name, wrap = trials[what]
            if moves_another_output(subject, subject.build(seed=subject.seed), name, wrap):
                continue
            fail(
                f"{what}, the logits move by {move:.3g} standard deviations, expected more than {SMALLEST:.0e}: "
                "this part of the computation has no effect",
                where=locate(subject.build(seed=subject.seed), name),
                likely=likely,
                advice="Follow this part to the output: look for a slice, an index or a reshape that leaves it out.",
                module=name,
            )
