"""Why a greedy text went wrong, read off the calls that generate made of its model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..expect import NotApplicable, fail
from .met_generate import Rows
from .scripted import Read, Stage


def explain(on: Stage, prompts: Tensor, said: Rows, want: Rows, *, turn: int, **options: Any) -> NoReturn:
    """Fails with the first wrong token, and with what the calls of the model tell about it.

    `on.reads` are the calls that led to `said`; `turn` is 1 if the same call was right the first time.
    """
    if on.naive(prompts, len(want[0])).tolist() != want:
        raise NotApplicable("the model answers the same text differently from call to call, in eval mode")
    row, step = first_wrong(said, want)
    B, T = prompts.shape
    if not on.decoder.batched:  # the calls of the last row alone are known: repeat those of the wrong one
        on.generate(prompts[row : row + 1], len(want[row]), **options)
        prompts, said, want, row = prompts[row : row + 1], [said[row]], [want[row]], 0
    cause, likely = why(on, prompts, said, want, row, step)
    if turn and not likely:
        likely = ("cache-leaks-between-calls",)
    got, right = (str(text[row][step]) if step < len(text[row]) else "nothing" for text in (said, want))
    again = "the second of two identical calls is wrong: " if turn else ""
    how = "".join(f", {name}={value}" for name, value in options.items())
    fail(
        f"{again}greedy from {B} prompts of {T} tokens{how}: row {row} says {said[row]}, and the naive loop "
        f"{want[row]}; token {step + 1} is {got}, should be {right}. {cause}",
        likely=likely,
        advice="compare with: logits = model(text)[:, -1]; text = torch.cat((text, logits.argmax(-1, True)), 1)",
        row=row,
        step=step,
        said=said[row],
        naive=want[row],
        cause=cause,
        **options,
    )


def first_wrong(said: Rows, want: Rows) -> tuple[int, int]:
    """The row and step of the earliest wrong token."""
    wrong = [
        (step, row)
        for row, (a, b) in enumerate(zip(said, want, strict=True))
        for step in range(max(len(a), len(b)))
        if a[step : step + 1] != b[step : step + 1]
    ]
    step, row = min(wrong)
    return row, step


def why(on: Stage, prompts: Tensor, said: Rows, want: Rows, row: int, step: int) -> tuple[str, tuple[str, ...]]:
    """What the calls tell: the position read, whose token was taken, what was read; and the likely bugs."""
    if len(said) > 1 and all(other == said[0] for other in said) and said[0] == want[0]:
        return "Every row is given the token of row 0", ("same-token-for-whole-batch",)
    if step >= len(on.reads) or step >= min(map(len, said)) or step >= len(want[row]):
        return f"The model was called {len(on.reads)} times", ()
    return next(iter(causes(on, prompts, said, row, step)))


def causes(on: Stage, prompts: Tensor, said: Rows, row: int, step: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    read = on.reads[step]
    logits = read.logits if read.logits.dim() == 3 else read.logits[None]
    chosen = torch.tensor([other[step] for other in said], device=logits.device)
    if len(logits) == len(chosen):
        yield from by_position(logits, chosen)
        yield from by_row(logits, chosen)
    if read.tokens is not None:
        tokens = read.tokens if read.tokens.dim() == 2 else read.tokens[None]
        text = torch.cat((prompts, torch.tensor(said, device=prompts.device)[:, :step]), dim=1)
        if len(tokens) == len(text):
            yield from by_tokens(on, tokens, text, row, step)
    yield "What it chose is not the likeliest token of any position that the model answered", ()


def by_position(logits: Tensor, chosen: Tensor) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Which position of the answer the tokens were taken from, if not from the last; or the least likely."""
    length = logits.shape[1]
    if bool((logits[:, -1].argmax(dim=-1) == chosen).all()):
        return
    for position in range(length - 1):
        if bool((logits[:, position].argmax(dim=-1) == chosen).all()):
            bugs = ("generate-first-position-logits",) if position == 0 else ("generate-reads-earlier-position",)
            yield f"It takes the logits at position {position} of the {length} read, not at {length - 1}", bugs
    if bool((logits[:, -1].argmin(dim=-1) == chosen).all()):
        yield "It takes the least likely token", ()


def by_row(logits: Tensor, chosen: Tensor) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Which row of the answer the tokens were taken from, where each is some row's but not its own row's."""
    likeliest = logits[:, -1].argmax(dim=-1)
    if len(chosen) < 2 or bool((likeliest == chosen).all()):
        return
    shared = ("same-token-for-whole-batch",)
    if bool((chosen == chosen[0]).all()) and bool((likeliest == chosen[0]).any()):
        sources = (likeliest == chosen[0]).nonzero().flatten().tolist()
        source = len(chosen) - 1 if len(chosen) - 1 in sources else sources[0]
        yield f"Every row is given the token of row {source}", shared
    rows = torch.arange(len(chosen), device=likeliest.device)
    for order in (rows.flip(0), rows.roll(1), rows.roll(-1)):
        if bool((likeliest[order] == chosen).all()):
            yield f"The rows are in another order: row 0 is given the token of row {int(order[0])}", shared


def by_tokens(on: Stage, tokens: Tensor, text: Tensor, row: int, step: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What was read, if not the text or its latest tokens; else the model answers differently than it does uncached."""
    T, length = text.shape[1], tokens.shape[1]
    if length > T or not torch.equal(tokens, text[:, T - length :]):
        yield (
            f"At step {step + 1} it read {tokens[row].tolist()}, where the text is {text[row].tolist()}",
            ("generate-drops-latest-token",),
        )
    elif answers_right(on, text, step):
        yield "The model answers rightly, and what is said is not its likeliest token", ("argmax-over-another-axis",)
    elif step and length == T and fed(on.reads[:step]):
        yield (
            f"At step {step + 1} all {T} tokens were read, {fed(on.reads[:step])} of which the cache held already",
            ("cache-refeeds-full-context", "cache-leaks-between-calls"),
        )
    elif length < T and not fed(on.reads[:step]) and not cached(on.reads):
        yield f"At step {step + 1} it read the last {length} of {T} tokens", ("generate-crop-off-by-one",)
    else:
        yield (
            f"At step {step + 1} the model, having read {length} of {T} tokens{' now' if length < T else ''}, answers "
            "otherwise than it does to the whole text at once",
            (
                "cache-leaks-between-calls",
                "cache-refeeds-full-context",
                "cache-not-appended",
                "decode-position-always-zero",
            ),
        )


def answers_right(on: Stage, text: Tensor, step: int) -> bool:
    """Whether the likeliest tokens of the answer at this step are those that follow from the text."""
    logits = on.reads[step].logits
    return logits.dim() == 3 and torch.equal(logits[:, -1].argmax(dim=-1), on.naive(text, 1)[:, 0])


def cached(reads: list[Read]) -> bool:
    """Whether the calls went through a cache: it was handed in, or single tokens followed longer texts."""
    lengths = [read.tokens.shape[-1] for read in reads if read.tokens is not None]
    return any(read.cached for read in reads) or (len(lengths) > 1 and lengths[0] > 1 and set(lengths[1:]) == {1})


def fed(reads: list[Read]) -> int:
    """How many tokens a cache had been handed in these calls."""
    return sum(read.tokens.shape[-1] for read in reads if read.cached and read.tokens is not None)
