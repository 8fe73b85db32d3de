"""Why greedy decoding gave a wrong token: found from the calls that generate made of its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..expect import NotApplicable, advise, fail
from .calls import cached, fed
from .draws import Caught
from .met_generate import Rows
from .prompts import continued
from .scripted import VARIES, Stage

Cause = tuple[str, tuple[str, ...]]  # what happened, and the ids of likely bugs


def explain(on: Stage, prompts: Tensor, got: Rows, want: Rows, *, turn: int, **options: Any) -> NoReturn:
    """Fails with the first wrong token, and with what the calls of the model tell about it.

    `on.reads` are the calls that led to `got`; `turn` is 1 if the same call was right the first time.
    """
    if on.naive(prompts, len(want[0])).tolist() != want:
        raise NotApplicable(VARIES)
    row, step = first_wrong(got, want)
    B, T = prompts.shape
    if not on.decoder.batched:  # only the calls of the last row were kept: repeat those of the wrong one
        on.generate(prompts[row : row + 1], len(want[row]), **options)
        prompts, got, want, row = prompts[row : row + 1], [got[row]], [want[row]], 0
    cause, likely = why(on, prompts, got, want, row, step)
    if turn and not likely:
        likely = ("cache-leaks-between-calls",)
    token, right = (str(text[row][step]) if step < len(text[row]) else "nothing" for text in (got, want))
    again = "the second of two identical calls is wrong: " if turn else ""
    how = "".join(f", {name}={value}" for name, value in options.items())
    fail(
        f"{again}greedy decoding from {B} prompts of {T} tokens{how}: row {row} gives {got[row]}, expected {want[row]} "
        f"(from reading the whole text at each step); new token {step + 1} of {len(want[row])} is {token}, should be "
        f"{right}. {cause}",
        likely=likely,
        advice="Compare with: logits = model(text)[:, -1]; text = torch.cat((text, logits.argmax(-1, True)), 1).",
        row=row,
        step=step,
        said=got[row],
        naive=want[row],
        cause=cause,
        **options,
    )


def first_wrong(got: Rows, want: Rows) -> tuple[int, int]:
    """The row and step of the earliest wrong token."""
    wrong = [
        (step, row)
        for row, (a, b) in enumerate(zip(got, want, strict=True))
        for step in range(max(len(a), len(b)))
        if a[step : step + 1] != b[step : step + 1]
    ]
    step, row = min(wrong)
    return row, step


def why(on: Stage, prompts: Tensor, got: Rows, want: Rows, row: int, step: int) -> Cause:
    """From the calls: the position and the row whose logits were used, and the tokens that were read."""
    if len(got) > 1 and all(other == got[0] for other in got) and got[0] == want[0]:
        return "Every row gets the token of row 0", ("same-token-for-whole-batch",)
    if step >= len(on.reads) or step >= min(map(len, got)) or step >= len(want[row]):
        return f"The model was called {len(on.reads)} times", ()
    return next(iter(causes(on, prompts, got, row, step)))


def causes(on: Stage, prompts: Tensor, got: Rows, row: int, step: int) -> Iterator[Cause]:
    read = on.reads[step]
    logits = read.logits if read.logits.dim() == 3 else read.logits[None]
    chosen = torch.tensor([other[step] for other in got], device=logits.device)
    if len(logits) == len(chosen):
        yield from by_position(logits, chosen)
        yield from by_row(logits, chosen)
    if read.tokens is not None:
        tokens = read.tokens if read.tokens.dim() == 2 else read.tokens[None]
        text = torch.cat((prompts, torch.tensor(got, device=prompts.device)[:, :step]), dim=1)
        if len(tokens) == len(text):
            yield from by_tokens(on, tokens, text, row, step)
    yield "The chosen token is not the likeliest at any position of the model's logits", ()


def by_position(logits: Tensor, chosen: Tensor) -> Iterator[Cause]:
    """The position whose logits the tokens were taken from, if not the last; or argmin instead of argmax."""
    length = logits.shape[1]
    if bool((logits[:, -1].argmax(dim=-1) == chosen).all()):
        return
    for position in range(length - 1):
        if bool((logits[:, position].argmax(dim=-1) == chosen).all()):
            bugs = ("generate-first-position-logits",) if position == 0 else ("generate-reads-earlier-position",)
            yield f"It uses the logits at position {position}, expected the last position, {length - 1}", bugs
    if bool((logits[:, -1].argmin(dim=-1) == chosen).all()):
        yield "It takes the least likely token", ()


def by_row(logits: Tensor, chosen: Tensor) -> Iterator[Cause]:
    """The row whose logits the tokens were taken from, if each token belongs to another row."""
    likeliest = logits[:, -1].argmax(dim=-1)
    if len(chosen) < 2 or bool((likeliest == chosen).all()):
        return
    shared = ("same-token-for-whole-batch",)
    if bool((chosen == chosen[0]).all()) and bool((likeliest == chosen[0]).any()):
        sources = (likeliest == chosen[0]).nonzero().flatten().tolist()
        source = len(chosen) - 1 if len(chosen) - 1 in sources else sources[0]
        yield f"Every row gets the token of row {source}", shared
    rows = torch.arange(len(chosen), device=likeliest.device)
    for order in (rows.flip(0), rows.roll(1), rows.roll(-1)):
        if bool((likeliest[order] == chosen).all()):
            yield f"The rows are in another order: row 0 gets the token of row {int(order[0])}", shared


def by_tokens(on: Stage, tokens: Tensor, text: Tensor, row: int, step: int) -> Iterator[Cause]:
    """The tokens that were read, if not the text or its latest ones; otherwise the cache gives other logits."""
    T, length = text.shape[1], tokens.shape[1]
    if length > T or not torch.equal(tokens, text[:, T - length :]):
        yield (
            f"At step {step + 1} it read {tokens[row].tolist()}, but the text is {text[row].tolist()}",
            ("generate-drops-latest-token",),
        )
    elif answers_right(on, text, step):
        yield choice(on, text, row, step)
    elif step and length == T and fed(on.reads[:step]):
        yield (
            f"At step {step + 1} all {T} tokens were read, but the cache already held {fed(on.reads[:step])} of them",
            ("cache-refeeds-full-context", "cache-leaks-between-calls"),
        )
    elif length < T and not fed(on.reads[:step]) and not cached(on.reads):
        yield f"At step {step + 1} it read the last {length} of {T} tokens", ("generate-crop-off-by-one",)
    else:
        yield (
            f"At step {step + 1}, given {length} of {T} tokens{' and its cache' if length < T else ''}, the model "
            "gives different logits than when it reads the whole text",
            (
                "cache-leaks-between-calls",
                "cache-refeeds-full-context",
                "cache-not-appended",
                "decode-position-always-zero",
            ),
        )


def choice(on: Stage, text: Tensor, row: int, step: int) -> Cause:
    """Why the token chosen from right logits [B, V] is not the likeliest: other rows, or what a filter lets through."""
    right = on.naive(text, 1)
    with Caught() as caught:
        alone, together = on.generate(text[row : row + 1], 1), on.generate(text, 1)
    if alone == right[row : row + 1].tolist() and together != right.tolist():
        return (
            "The model's logits are right, and alone this row gets the right token: what is chosen for a row depends "
            "on the other rows of the batch",
            ("topp-order-of-row-zero",) if caught.weights else ("argmax-over-another-axis",),
        )
    if caught.weights:
        weights = caught.weights[0][0]
        alike = int((weights > weights.max() / 2).sum())
        if alike > 1:
            return (
                f"By the model's logits one token has nearly all of the probability, but {alike} are about equally "
                "likely when one is drawn: what a filter rejects can still be drawn (set it to -inf, not to 0)",
                ("rejected-logits-set-to-zero",),
            )
    return "The model's logits are right, but the chosen token is not the likeliest", ("argmax-over-another-axis",)


def answers_right(on: Stage, text: Tensor, step: int) -> bool:
    """Whether the likeliest tokens of the logits at this step are those that follow the text."""
    logits = on.reads[step].logits
    return logits.dim() == 3 and torch.equal(logits[:, -1].argmax(dim=-1), on.naive(text, 1)[:, 0])


def explain_padding(on: Stage, alone: list[Tensor], side: str, got: Rows, want: Rows) -> NoReturn:
    """Fails with the first token that differs from what its prompt gives alone, and with what the calls tell."""
    continued(on, alone, side, len(want[0]))
    row, step = first_wrong(got, want)
    read = on.reads[0]
    cause, likely = "", ["left-pad-positions-not-from-mask", "generate-forgets-padding"]
    if read.tokens is not None and read.tokens.dim() == 2 and not read.masked:
        cause, likely = ": the model is called without a mask", ["generate-forgets-padding"]
    elif read.tokens is not None and on.decoder.batched and int(read.tokens[row, -1]) != int(alone[row][0, -1]):
        last = read.tokens.shape[1] - 1
        cause = f": the next token is taken from position {last}, which is padding; the last real token of the row is "
        cause += f"{int(alone[row][0, -1])}, in {read.tokens[row].tolist()}"
        likely = ["generate-right-pad-last-logits"]
    lengths = [prompt.shape[1] for prompt in alone]
    fail(
        f"prompts of {lengths} tokens, padded on the {side} to {max(lengths)}: row {row} continues with {got[row]}, "
        f"expected {want[row]} (as the prompt gives alone); the first wrong one is new token {step + 1} of "
        f"{len(want[row])}{cause}",
        likely=likely,
        advice="Pass the mask, one position longer each time, to every call of the model; count positions from the "
        "mask; take the next token from each row's last real position.",
        row=row,
        step=step,
        said=got[row],
        alone=want[row],
    )


# Which part of a text generate reads


def expect_latest_read(on: Stage, text: Tensor, new: Tensor) -> None:
    """Fails unless the new tokens [B] follow from the last tokens of the text [B, T]: all that fit in the block."""
    T, block = text.shape[1], on.block_size
    fits = min(T, block)
    if bool((follow(on, text[:, -fits:]) == new).all()):
        return
    window = next((w for w in (T, *range(fits - 1, 0, -1)) if explains(on, text[:, -w:], new)), None)
    if window is None:
        first = T > block and explains(on, text[:, :block], new)
        if not first and T > block and slides(on, text):
            advise(
                f"past the block size, {on.decoder.name} keeps a sliding cache: its keys were computed from tokens "
                "that are no longer in the window"
            )
            return
        fail(
            f"after {T} tokens, {T - block if T > block else 'not'} past the block size of {block}, the new tokens "
            + (f"are computed from the first {block} tokens" if first else "are not computed from the latest tokens"),
            likely=("generate-no-context-crop",) if first else ("generate-no-context-crop", "cache-overflow"),
            advice=f"Read tokens[:, -{block}:], and refill the cache from these tokens: their positions have changed.",
            length=T,
            block_size=block,
        )
    if window < fits and T <= block:
        fail(
            f"after {T} tokens only the last {window} are read, although the block size of {block} has room for all",
            likely=("generate-crop-off-by-one",),
            advice=f"Crop to the last {block} tokens: tokens[:, -{block}:].",
            length=T,
            read=window,
            block_size=block,
        )
    advise(f"past the block size of {block}, {on.decoder.name} reads the last {window} of {T} tokens")


def slides(on: Stage, text: Tensor) -> bool:
    """Whether the cache may outgrow the block: generate uses one, and the model reads texts of any length."""
    try:
        return cached(on.reads) and bool(on.ask(text).isfinite().all())
    except Exception:
        return False


def follow(on: Stage, text: Tensor) -> Tensor:
    return on.follow(on.ask(text), text)


def explains(on: Stage, text: Tensor, new: Tensor) -> bool:
    """Whether the new tokens follow from this text; a text that the model refuses explains nothing."""
    try:
        return bool((follow(on, text) == new).all())
    except Exception:
        return False
