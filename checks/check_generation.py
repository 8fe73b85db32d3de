"""Generate says what the model says: greedy against the naive loop, and nothing else is touched on the way.

Its model speaks by a script (scripted.py) under which every sampler is greedy. How tokens are drawn: check_sampling.py.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .expect import APPENDS, GREEDY, REPEATS, SHAPE, NotApplicable, advise, fail, needs, note
from .generation.faults import cached, explain, first_wrong
from .generation.met_generate import Rows
from .generation.scripted import Stage, graphs, stage
from .probes.module_state import renormalized
from .subject import Subject
from .watch.draws import states

CACHED = "check_cache.check_cached_decoding_equals_full"
ISOLATED = "check_cache.check_caches_are_isolated"
PADDED = ("check_cache.check_cached_padding_equals_full", "check_masking.check_left_padding_changes_nothing")
ROWS = 64  # so many that no two windows of the text are followed by the same tokens in all of them


@needs(SHAPE, REPEATS, CACHED, ISOLATED)
def check_generate_appends_tokens(subject: Subject) -> None:
    """Generate gives exactly as many new tokens as were asked for, behind the unchanged prompt or alone."""
    on = stage(subject)
    for n in (1, 4):
        prompts = subject.tokens(2, 3, seed=subject.seed)
        for row, (answer, prompt) in enumerate(on.decoder.answers(on.model, prompts, n)):
            expect_prefix(on, row, answer, prompt)
            new = answer[len(prompt) :] if on.decoder.with_prompt else answer
            if len(new) != n:
                fail(
                    f"asked for {n} new tokens, row {row} has {len(new)}: {new} after the prompt {prompt}",
                    likely=("generate-length-off-by-one",),
                    advice="Count the turns of the loop: range(max_new_tokens), one token appended in each.",
                    asked=n,
                    got=len(new),
                )
            if not all(0 <= token < on.vocab_size for token in new):
                fail(
                    f"new tokens {new} are not all ids of the vocabulary, 0 to {on.vocab_size - 1}",
                    advice="A token is an index into the logits' last axis, as argmax(-1) or multinomial gives it.",
                    new=new,
                )
    if on.banned:
        advise(
            f"{on.decoder.name} never says token id {', '.join(map(str, on.banned))}: right if that is a begin or a pad"
        )
    note(form=on.decoder.form, batched=on.decoder.batched, returns_prompt=on.decoder.with_prompt)


def expect_prefix(on: Stage, row: int, answer: list[int], prompt: list[int]) -> None:
    if not on.decoder.with_prompt or answer[: len(prompt)] == prompt:
        return
    at = next(i for i, token in enumerate(prompt) if i >= len(answer) or answer[i] != token)
    fail(
        f"the answer does not begin with the prompt: row {row} is {answer}, and the prompt {prompt} "
        f"differs from it at position {at}",
        advice="write new tokens behind the prompt, into a tensor of your own",
        position=at,
    )


@needs(APPENDS)
def check_greedy_equals_the_naive_loop(subject: Subject) -> None:
    """Greedy decoding says what reading the whole text anew at each step says: any batch size, cached or not, twice."""
    on, block = stage(subject), subject.sizes.block_size
    V = min(on.vocab_size, 32 if on.decoder.batched else 6)
    for B, T, n in ((V, 3, 3), (1, 4, 5), (3, 1 if on.reads_one else 2, 5)):
        n = max(1, min(n, block - T))
        prompts = on.prompts(B, min(T, block - n), n)
        want = on.naive(prompts, n).tolist()
        for options in cache_options(on):
            for turn in range(2):
                said = on.generate(prompts, n, **greedily(on), **options)
                if said != want and not needs_preparing(on, options):
                    explain(on, prompts, said, want, turn=turn, **options)
        note(**{f"distinct tokens from {B} prompts": len({token for row in want for token in row})})
    expect_nothing_kept(on)


def expect_nothing_kept(on: Stage) -> None:
    """After a text, another that is as long as that one became, or one token more or less, is continued as if alone."""
    T, n = 2, 2
    for longer in (T + n - 1, T + n, T + n + 1):
        if longer + 2 > on.block_size:
            return
        first, then = on.prompts(2, T, n), on.prompts(2, longer, 2)
        for options in cache_options(on):
            on.generate(first, n, **greedily(on), **options)
            said, want = on.generate(then, 2, **greedily(on), **options), on.naive(then, 2).tolist()
            if said != want and not needs_preparing(on, options):
                row, step = first_wrong(said, want)
                fail(
                    f"after a call with prompts of {T} tokens and {n} new ones, one with prompts of {longer} tokens "
                    f"goes wrong: row {row} says {said[row]}, and the naive loop {want[row]}. Something of the first "
                    "call is still there, and is taken for this text because its length fits",
                    likely=("generate-keeps-its-cache",),
                    advice="begin every call with an empty cache",
                    row=row,
                    step=step,
                    said=said[row],
                    naive=want[row],
                )


def greedily(on: Stage) -> dict[str, Any]:
    """The greedy way of a generate that has one; under the script drawing comes to the same."""
    return {"sample": False} if {"sample", "greedy"} & on.decoder.takes.keys() else {}


def cache_options(on: Stage) -> list[dict[str, bool]]:
    """With the cache and without, where the function lets one choose."""
    if not isinstance(on.decoder.defaults.get("use_cache", False), bool) or "use_cache" not in on.decoder.takes:
        return [{}]
    return [{"use_cache": True}, {"use_cache": False}]


def needs_preparing(on: Stage, options: dict[str, bool]) -> bool:
    """A cache that is off unless asked for may have to be installed first: wrong text over it is no finding."""
    if not options.get("use_cache") or on.decoder.defaults.get("use_cache"):
        return False
    advise(
        f"{on.decoder.name} with its cache on says something else than without: if the cache needs no preparing, look"
    )
    return True


@needs(APPENDS, GREEDY)
def check_generate_reads_all_that_fits(subject: Subject) -> None:
    """Up to the block size the whole text is read; past it the latest tokens are, or generate refuses."""
    on, block = stage(subject), subject.sizes.block_size
    T, n = block - 1, 4
    if T < 2 or block > 512:
        raise NotApplicable(f"a block size of {block} is too {'short' if T < 2 else 'long'} to be filled")
    prompts = on.prompts(ROWS if on.decoder.batched else 8, T, n)
    try:
        said = on.generate(prompts, n, **greedily(on))
    except Exception as error:
        note(past_the_block_size=f"raises {type(error).__name__}")
        refusal(on, error)
        said = on.generate(prompts, block - T, **greedily(on))
    text = prompts
    for step in range(min(len(row) for row in said)):
        new = torch.tensor([row[step] for row in said], device=text.device)
        expect_latest_read(on, text, new)
        text = torch.cat((text, new[:, None]), dim=1)
    if text.shape[1] < T + n:
        advise(
            f"{on.decoder.name} stops at {text.shape[1]} tokens, as many as the block size holds, and does not say so"
        )


def refusal(on: Stage, error: Exception) -> None:
    if isinstance(error, IndexError) or "index" in str(error).lower() or not str(error):
        advise(
            f"past the block size {on.decoder.name} dies with {type(error).__name__}: {error}. Read only the latest "
            f"{on.block_size} tokens at each step, or refuse with the two lengths in the message"
        )


def expect_latest_read(on: Stage, text: Tensor, new: Tensor) -> None:
    """The new tokens [B] follow from the last tokens of the text [B, T]: all of them, or a block at least."""
    T, block = text.shape[1], on.block_size
    fits = min(T, block)
    if bool((follow(on, text[:, -fits:]) == new).all()):
        return
    window = next((w for w in (T, *range(fits - 1, 0, -1)) if explains(on, text[:, -w:], new)), None)
    if window is None:
        first = T > block and explains(on, text[:, :block], new)
        if not first and T > block and slides(on, text):
            advise(
                f"past the block size {on.decoder.name} slides its cache: kept keys were made from older tokens, too"
            )
            return
        fail(
            f"after {T} tokens, {T - block if T > block else 'not'} past the block size of {block}, the new tokens "
            f"follow from {f'the first {block} tokens' if first else 'no suffix'} of the text",
            likely=("generate-no-context-crop",) if first else ("generate-no-context-crop", "cache-overflow"),
            advice=f"read tokens[:, -{block}:]; a cache holds keys of positions that no longer exist: fill it anew",
            length=T,
            block_size=block,
        )
    if window < fits and T <= block:
        fail(
            f"after {T} tokens only the last {window} are read, though the block size of {block} has room for all",
            likely=("generate-crop-off-by-one",),
            advice=f"crop to the last {block} tokens: tokens[:, -{block}:]",
            length=T,
            read=window,
            block_size=block,
        )
    advise(f"past the block size {on.decoder.name} reads the last {window} tokens of {T}, block size {block}")


def slides(on: Stage, text: Tensor) -> bool:
    """Whether a cache may go on past the block size: generate hands one over, and the model reads any number."""
    try:
        return cached(on.reads) and bool(on.ask(text).isfinite().all())
    except Exception:
        return False


def follow(on: Stage, text: Tensor) -> Tensor:
    return on.script(on.ask(text)[:, None], text[:, -1:])[:, -1].argmax(dim=-1)


def explains(on: Stage, text: Tensor, new: Tensor) -> bool:
    """Whether the new tokens follow from this text; a text that the model refuses explains nothing."""
    try:
        return bool((follow(on, text) == new).all())
    except Exception:
        return False


@needs(APPENDS, GREEDY, *PADDED)
def check_padded_prompts_continue_as_alone(subject: Subject) -> None:
    """In a batch of padded prompts each is continued as it is alone, whatever stands in the padding."""
    on, n = stage(subject), 4
    longest = max(2, min(5, subject.sizes.block_size - n))
    lengths = [min(length, longest) for length in (2, 5, 3, 1 if on.reads_one else 4)]
    alone = [on.prompts(1, length, n) for length in lengths]
    want = [on.naive(prompt, n).tolist()[0] for prompt in alone]
    wrong: dict[str, Rows] = {}
    for side in ("left", "right"):
        said = continued(on, alone, side, n)
        if said == want:
            note(padding=side)
            break
        if said is not None:
            wrong[side] = said
    else:
        if not wrong:
            raise NotApplicable(f"{on.decoder.name} refuses padded prompts on either side")
        judge_padding(on, alone, wrong, want)
    if side == "left" and continued(on, alone, "right", n) not in (None, want):
        advise(f"prompts padded on the right are accepted by {on.decoder.name} and continued from their padding")


def continued(on: Stage, alone: list[Tensor], side: str, n: int) -> Rows | None:
    """What generate says after these prompts as one batch; None if it refuses that padding."""
    if on.decoder.form == "lists" and on.decoder.batched:
        return on.generate([prompt.tolist()[0] for prompt in alone], n, **greedily(on))
    on.decoder.wants("mask")
    if not on.decoder.batched:
        raise NotApplicable(f"{on.decoder.name} takes one prompt at a time")
    T = max(prompt.shape[1] for prompt in alone)
    tokens, mask = on.subject.tokens(len(alone), T, seed=on.subject.seed + 1), torch.zeros(len(alone), T)
    for row, prompt in enumerate(alone):
        real = slice(T - prompt.shape[1], T) if side == "left" else slice(0, prompt.shape[1])
        tokens[row, real], mask[row, real] = prompt[0], 1
    return first_accepted(on, tokens, mask.to(tokens.device), n)[0]


def first_accepted(on: Stage, tokens: Tensor, mask: Tensor, n: int) -> tuple[Rows | None, torch.dtype]:
    """What is said under a mask of truth values or of integers, whichever does not raise, and which it was."""
    for dtype in (torch.long, torch.bool) if on.decoder.of_transformers else (torch.bool, torch.long):
        try:
            return on.generate(tokens, n, mask=mask.to(dtype), **greedily(on)), dtype
        except Exception:
            continue
    return None, torch.long


def judge_padding(on: Stage, alone: list[Tensor], wrong: dict[str, Rows], want: Rows) -> None:
    side, said = next(iter(wrong.items()))
    continued(on, alone, side, len(want[0]))
    row, step = first_wrong(said, want)
    read = on.reads[0]
    cause, likely = "", ["left-pad-positions-not-from-mask", "generate-forgets-padding"]
    if read.tokens is not None and read.tokens.dim() == 2 and not read.masked:
        cause, likely = ": the model was handed no mask", ["generate-forgets-padding"]
    elif read.tokens is not None and on.decoder.batched and int(read.tokens[row, -1]) != int(alone[row][0, -1]):
        last = read.tokens.shape[1] - 1
        cause = f": the next token is read at position {last}, which is padding; the last real token of the row is "
        cause += f"{int(alone[row][0, -1])}, in {read.tokens[row].tolist()}"
        likely = ["generate-right-pad-last-logits"]
    lengths = [prompt.shape[1] for prompt in alone]
    fail(
        f"prompts of {lengths} tokens, padded on the {side} to {max(lengths)}: row {row} goes on with {said[row]}, "
        f"alone with {want[row]}; the first wrong token is number {step + 1}{cause}",
        likely=likely,
        advice="hand the mask to every call of the model, longer by one each time; count positions from the mask; "
        "read the next token at each row's last real position",
        row=row,
        step=step,
        said=said[row],
        alone=want[row],
    )


@needs(APPENDS, GREEDY)
def check_end_token_ends_its_row(subject: Subject) -> None:
    """A row that produced the end token is filled up or cut off, and the others go on as if nothing had happened."""
    on, n = stage(subject), 6
    on.decoder.wants("end")
    prompts, base, end = with_an_end(on, n)
    pad = next(token for token in range(on.vocab_size) if token != end and token not in base[0])
    options = {"end": on.decoder.end_value(end), **({"pad": pad} if "pad" in on.decoder.takes else {})}
    try:
        said = on.generate(prompts, n, **greedily(on), **options)
    except Exception as error:
        if not on.decoder.batched:
            raise
        advise(f"with an end token {on.decoder.name} takes one row only: {type(error).__name__}: {error}")
        said = [on.generate(prompts[i : i + 1], n, **greedily(on), **options)[0] for i in range(len(base))]
    for row, (got, whole) in enumerate(zip(said, base, strict=True)):
        expect_ended(row, got, whole, end, said)
    note(end=end, ended=[row.index(end) if end in row else None for row in base])
    look_at_prompts_with_an_end(on, n)


def look_at_prompts_with_an_end(on: Stage, n: int) -> None:
    """Advice where a prompt that has the end token in it is not continued: ends often begin texts, too."""
    prompts = on.prompts(2, 2, 3)
    want, end = on.naive(prompts, 3).tolist(), int(prompts[0, 0])
    if any(end in row for row in want):
        return
    try:
        said = on.generate(prompts[:1], 3, **greedily(on), end=on.decoder.end_value(end))
    except Exception:
        return
    if said[0] != want[0]:
        advise(
            f"a prompt that has the end token in it is not continued by {on.decoder.name} ({said[0]}): look for the "
            "end among new tokens only"
        )


def with_an_end(on: Stage, n: int) -> tuple[Tensor, Rows, int]:
    """Prompts, what follows them without an end, and a token that ends one row early and another not at all."""
    for draw in range(20):
        T = max(1, min(3 + draw % 2, on.block_size - n))
        prompts = on.prompts(4 + draw, T, n)
        base = on.naive(prompts, n).tolist()
        for i, row in enumerate(base):
            rest, end = row[2:], row[1]
            others = [other for other in base if end not in other]
            if row[0] != end and others and len(set(rest)) > 1:
                chosen = [i, base.index(others[0])]
                return prompts[chosen], [base[j] for j in chosen], end
    raise NotApplicable("the model's text has no token that one row says and another does not")


def expect_ended(row: int, got: list[int], whole: list[int], end: int, said: Rows) -> None:
    at = whole.index(end) if end in whole else None
    if at is None and got != whole:
        early = f"stops after {len(got)} of {len(whole)} tokens because another row produced the end token {end}"
        other = f"never produced the end token {end}, and yet its text changed: {got}, without an end {whole}"
        fail(
            f"row {row} {early if got == whole[: len(got)] else other}",
            likely=("stops-when-any-row-eos",),
            advice="keep a finished flag for every row, and stop when all are",
            row=row,
            got=got,
            without_end=whole,
        )
    if at is None or got == whole[:at]:  # goes on as it should, or cut off before the end token
        return
    kept, filled = got[: at + 1], got[at + 1 :]
    if kept != whole[: at + 1]:
        fail(
            f"row {row} is {got}, and without an end token {whole}: they differ before its end",
            advice="An end token may only stop a row; leave its logit and the tokens before it as they are.",
            row=row,
            got=got,
        )
    if len(set(filled)) > 1:
        fail(
            f"row {row} produced the end token {end} as token {at + 1} and goes on with {filled}",
            likely=("continues-after-eos",),
            advice="once a row has ended, overwrite what it would say with the pad token",
            row=row,
            end=end,
            after=filled,
        )


@needs(APPENDS)
def check_generate_leaves_prompt_and_weights(subject: Subject) -> None:
    """The prompt, its mask and the model's weights are after a call bit for bit what they were."""
    on = stage(subject)
    weights = {name: value.detach().clone() for name, value in on.model.named_parameters()}
    rows = subject.tokens(2 if on.decoder.batched else 1, 3, seed=subject.seed).tolist()
    prompt = on.decoder.given(rows, subject.device)
    given, was = {}, torch.ones(len(rows), 3, dtype=torch.long, device=subject.device)
    if "mask" in on.decoder.takes and on.decoder.form == "rows":
        given = {"mask": was.to(first_accepted(on, prompt, was, 4)[1])}
    with on.watching():
        on.decoder.raw(on.model, prompt, len(rows), 4, **given)
    left = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    before = on.decoder.given(rows, subject.device)
    if left != (before.tolist() if isinstance(before, Tensor) else before):
        fail(
            f"the prompt was {rows} and is {left} after the call: {on.decoder.name} writes into its caller's data",
            likely=("generate-mutates-prompt",),
            advice="build the answer with torch.cat or in a copy, never with prompt[:, t] = … or prompt.append(…)",
            before=rows,
            after=left,
        )
    if given and not torch.equal(given["mask"].long(), was):
        fail(
            f"the mask was all ones and is {given['mask'].tolist()} after the call: {on.decoder.name} writes into it",
            advice="Extend a copy, torch.cat((mask, ones), dim=1), never mask[:, t] = …",
        )
    for name, value in on.model.named_parameters():
        if not torch.equal(value, weights[name]) and name not in renormalized(on.model):
            fail(
                f"{on.decoder.name} changed the parameter {name}",
                advice="Decoding only reads: look for an operation in place (a trailing underscore, +=) on a weight.",
                parameter=name,
            )


@needs(APPENDS)
def check_generate_restores_the_mode(subject: Subject) -> None:
    """A model in eval mode decodes without dropout, and one in train mode is in train mode again afterwards."""
    on = stage(subject)
    prompts = subject.tokens(2, 3, seed=subject.seed)
    on.model.eval()
    on.generate(prompts, 3)
    if any(read.training for read in on.reads):
        fail(
            f"{on.decoder.name} decodes in train mode, though the model was in eval mode: dropout is on in its text",
            likely=("generate-without-eval",),
            advice="model.eval() before the loop, and the mode that was found after it",
        )
    expect_mode(on, False)
    on.model.train()
    on.generate(prompts, 3)
    if any(read.training for read in on.reads):
        advise(f"{on.decoder.name} leaves dropout on when the model is in train mode: call model.eval() before it")
    expect_mode(on, True)
    options = ends_early(on)
    if options:
        on.model.train()
        on.generate(on.prompts(1, 3, 1), 3, **greedily(on), **options)
        expect_mode(on, True, " whose text ended early")


def ends_early(on: Stage) -> dict[str, Any]:
    """Options under which every row ends with its first token, where generate knows an end."""
    if "end" not in on.decoder.takes:
        return {}
    prompt = on.prompts(1, 3, 1)
    return {"end": on.decoder.end_value(int(on.naive(prompt, 1)[0, 0]))}


def expect_mode(on: Stage, training: bool, when: str = "") -> None:
    modules = [name or type(on.model).__name__ for name, m in on.model.named_modules() if m.training is not training]
    if not modules:
        return
    was, now = ("train", "eval") if training else ("eval", "train")
    fail(
        f"the model was in {was} mode and {len(modules)} of its modules are in {now} mode after {on.decoder.name}{when}"
        + (": from the first sample on, training goes on without dropout" if training else ""),
        likely=("generate-leaves-eval-mode",),
        advice="remember model.training, and give it back in a finally",
        modules=modules[:5],
    )


@needs(APPENDS)
def check_generate_keeps_no_graph(subject: Subject) -> None:
    """No autograd graph of an earlier step is kept while decoding."""
    on, n = stage(subject), 6
    prompts = subject.tokens(1, max(1, min(3, subject.sizes.block_size - n)), seed=subject.seed)
    with torch.enable_grad(), graphs(on.model) as alive:
        on.generate(prompts, n)
    if not alive:
        raise NotApplicable("the model looks its tokens up in no nn.Embedding")
    if alive[-1] > 3:
        fail(
            f"at step {len(alive)} the autograd graphs of {alive[-1]} steps are alive: memory grows with every token",
            likely=("generate-keeps-graph",),
            advice="decorate generate with @torch.no_grad() or @torch.inference_mode()",
            alive=alive,
        )
    if alive[-1]:
        advise(f"{on.decoder.name} builds an autograd graph at each step: @torch.no_grad() saves its time and memory")


@needs(APPENDS)
def check_generate_leaves_random_states(subject: Subject) -> None:
    """Generate may draw from a global random state, but never sets it: training goes on as if nothing had been said."""
    on = stage(subject)
    prompts = subject.tokens(1, 2, seed=subject.seed)
    asked = [{}, *([{"seed": 5}] if "seed" in on.decoder.takes else [])]
    for options in asked:
        after = [state_after(on, prompts, seed, **options) for seed in (subject.seed + 11, subject.seed + 12)]
        rewound = [name for name in after[0] if after[0][name] == after[1][name] and name in SEEDED]
        if rewound:
            fail(
                f"the global random state of {' and '.join(rewound)} after {on.decoder.name} does not depend on what "
                f"it was before: it is seeded inside{' by seed=5' if options else ''}, so that every sample rewinds "
                "training's dropout and shuffling",
                likely=("generate-reseeds-global-state", "seed-fixed-inside-generate"),
                advice="draw with a torch.Generator of your own, or leave seeding to the caller",
                states=rewound,
            )


SEEDED = ("PyTorch", "Python")


def state_after(on: Stage, prompts: Tensor, start: int, **options: Any) -> dict[str, bytes]:
    python = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        random.seed(start)
        try:
            on.generate(prompts, 3, **options)
            return states()
        finally:
            random.setstate(python)
