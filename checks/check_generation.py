"""Generate: greedy decoding against the naive loop, prompts and end tokens, and no side effects on the model.

The model's logits are rewritten so that every sampler is greedy (generation/scripted.py). How tokens are sampled is
judged by check_sampling.py.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .expect import APPENDS, GREEDY, REPEATS, SHAPE, NotApplicable, advise, fail, needs, note
from .generation.calls import graphs
from .generation.faults import expect_latest_read, explain, explain_padding, first_wrong
from .generation.met_generate import Rows
from .generation.prompts import continued, ends_early, first_accepted, with_an_end
from .generation.scripted import Stage, stage
from .probes.module_state import renormalized
from .subject import Subject, torch_seeded
from .watch.draws import states

CACHED = "check_cache.check_cached_decoding_equals_full"
ISOLATED = "check_cache.check_caches_are_isolated"
PADDED = ("check_cache.check_cached_padding_equals_full", "check_masking.check_left_padding_changes_nothing")
ROWS = 64  # enough that no two windows of the text are followed by the same tokens in all rows


@needs(SHAPE, REPEATS, CACHED, ISOLATED)
def check_generate_appends_tokens(subject: Subject) -> None:
    """Generate must return exactly the number of new tokens asked for, alone or after the unchanged prompt."""
    on = stage(subject)
    for n in (1, 4):
        prompts = subject.tokens(2, 3, seed=subject.seed)
        for row, (output, prompt) in enumerate(on.decoder.answers(on.model, prompts, n)):
            expect_prefix(on, row, output, prompt)
            new = output[len(prompt) :] if on.decoder.with_prompt else output
            if len(new) != n:
                fail(
                    f"asked for {n} new token{'s' * (n > 1)}, row {row} has {len(new)}: {new} after prompt {prompt}",
                    likely=("generate-length-off-by-one",),
                    advice="Loop over range(max_new_tokens) and append one token in each iteration.",
                    asked=n,
                    got=len(new),
                )
            if not all(0 <= token < on.vocab_size for token in new):
                fail(
                    f"the new tokens {new} are not all in the vocabulary, 0 to {on.vocab_size - 1}",
                    advice="Take token ids as indices into the last axis of the logits: argmax(-1) or multinomial.",
                    new=new,
                )
    if on.banned:
        banned = ", ".join(map(str, on.banned))
        advise(f"{on.decoder.name} never generates token id {banned}: correct if that is a begin or a pad token")
    note(form=on.decoder.form, batched=on.decoder.batched, returns_prompt=on.decoder.with_prompt)


def expect_prefix(on: Stage, row: int, output: list[int], prompt: list[int]) -> None:
    if not on.decoder.with_prompt or output[: len(prompt)] == prompt:
        return
    at = next(i for i, token in enumerate(prompt) if i >= len(output) or output[i] != token)
    fail(
        f"the output does not begin with the prompt: row {row} is {output}, but the prompt is {prompt}; they differ "
        f"at position {at}",
        advice="Append the new tokens to the prompt, in a new tensor.",
        position=at,
    )


@needs(APPENDS)
def check_greedy_equals_the_naive_loop(subject: Subject) -> None:
    """Greedy decoding must give the same tokens as reading the whole text again at each step: for any batch size, with
    and without the cache, and in a second call.
    """
    on, block = stage(subject), subject.sizes.block_size
    V = subject.affordable(32, min(on.vocab_size, 32 if on.decoder.batched else 6), least=2)
    for B, T, n in ((V, 3, 3), (1, 4, 5), (3, 1 if on.reads_one else 2, 5)):
        n = max(1, min(n, block - T))
        prompts = on.prompts(B, min(T, block - n), n)
        want = on.naive(prompts, n).tolist()
        for options in on.cache_options:
            for turn in range(2):
                got = on.greedy(prompts, n, **options)
                if got != want and not needs_preparing(on, options):
                    explain(on, prompts, got, want, turn=turn, **options)
        note(**{f"distinct tokens from {B} prompts": len({token for row in want for token in row})})
    expect_nothing_kept(on)


def expect_nothing_kept(on: Stage) -> None:
    """A second call, with prompts as long as the texts of the first or one token off, must not see the first."""
    T, n = 2, 2
    for longer in (T + n - 1, T + n, T + n + 1):
        if longer + 2 > on.block_size:
            return
        first, then = on.prompts(2, T, n), on.prompts(2, longer, 2)
        for options in on.cache_options:
            on.greedy(first, n, **options)
            got, want = on.greedy(then, 2, **options), on.naive(then, 2).tolist()
            if got != want and not needs_preparing(on, options):
                row, step = first_wrong(got, want)
                fail(
                    f"after a call with prompts of {T} tokens and {n} new tokens, a call with prompts of {longer} "
                    f"tokens goes wrong: row {row} gives {got[row]}, expected {want[row]}. Something from the first "
                    "call is kept and used again because its length fits",
                    likely=("generate-keeps-its-cache",),
                    advice="Start every call with an empty cache.",
                    row=row,
                    step=step,
                    said=got[row],
                    naive=want[row],
                )


def needs_preparing(on: Stage, options: dict[str, bool]) -> bool:
    """A cache that is off by default may have to be installed first: wrong tokens with it are only advice."""
    if not options.get("use_cache") or on.decoder.defaults.get("use_cache"):
        return False
    advise(
        f"{on.decoder.name} gives different tokens with its cache than without: a bug, unless the cache has to be "
        "prepared first"
    )
    return True


@needs(APPENDS, GREEDY)
def check_generate_reads_all_that_fits(subject: Subject) -> None:
    """Up to the block size, generate must read the whole text; past it, the latest tokens, or it must raise an
    error.
    """
    on, block = stage(subject), subject.sizes.block_size
    T, n = block - 1, 4
    if T < 2 or block > 512:
        raise NotApplicable(f"a block size of {block} is too {'short' if T < 2 else 'long'} for this check")
    rows = subject.affordable(2 * block * n, ROWS if on.decoder.batched else 8, least=2)
    prompts = on.prompts(rows, T, n)
    try:
        got = on.greedy(prompts, n)
    except Exception as error:
        note(past_the_block_size=f"raises {type(error).__name__}")
        advise_of_refusal(on, error)
        got = on.greedy(prompts, block - T)
    text = prompts
    for step in range(min(len(row) for row in got)):
        new = torch.tensor([row[step] for row in got], device=text.device)
        expect_latest_read(on, text, new)
        text = torch.cat((text, new[:, None]), dim=1)
    if text.shape[1] < T + n:
        advise(f"{on.decoder.name} stops silently at {text.shape[1]} tokens, the block size")


def advise_of_refusal(on: Stage, error: Exception) -> None:
    if isinstance(error, IndexError) or "index" in str(error).lower() or not str(error):
        advise(
            f"past the block size, {on.decoder.name} crashes with {type(error).__name__}: {error}. Read only the "
            f"latest {on.block_size} tokens at each step, or raise an error that names both lengths"
        )


@needs(APPENDS, GREEDY, *PADDED)
def check_padded_prompts_continue_as_alone(subject: Subject) -> None:
    """In a batch of padded prompts, each must be continued as it is alone, whatever the padding contains."""
    on, n = stage(subject), 4
    longest = max(2, min(5, subject.sizes.block_size - n))
    lengths = [min(length, longest) for length in (2, 5, 3, 1 if on.reads_one else 4)]
    alone = [on.prompts(1, length, n) for length in lengths]
    want = [on.naive(prompt, n).tolist()[0] for prompt in alone]
    wrong: dict[str, Rows] = {}
    for side in ("left", "right"):
        got = continued(on, alone, side, n)
        if got == want:
            note(padding=side)
            break
        if got is not None:
            wrong[side] = got
    else:
        if not wrong:
            raise NotApplicable(f"{on.decoder.name} raises an error for prompts padded on either side")
        side, got = next(iter(wrong.items()))
        explain_padding(on, alone, side, got, want)
    if side == "left" and continued(on, alone, "right", n) not in (None, want):
        advise(f"{on.decoder.name} accepts prompts padded on the right, but continues them from their padding")


@needs(APPENDS, GREEDY)
def check_end_token_ends_its_row(subject: Subject) -> None:
    """After its end token a row must be cut off or filled with one token, and the other rows must continue as
    before.
    """
    on, n = stage(subject), 6
    on.decoder.wants("end")
    prompts, base, end = with_an_end(on, n)
    pad = next(token for token in range(on.vocab_size) if token != end and token not in base[0])
    options = {"end": on.decoder.end_value(end), **({"pad": pad} if "pad" in on.decoder.takes else {})}
    try:
        got = on.greedy(prompts, n, **options)
    except Exception as error:
        if not on.decoder.batched:
            raise
        advise(f"with an end token, {on.decoder.name} works for one row only: {type(error).__name__}: {error}")
        got = [on.greedy(prompts[i : i + 1], n, **options)[0] for i in range(len(base))]
    for row, (new, whole) in enumerate(zip(got, base, strict=True)):
        if "beams" in on.decoder.takes and new == whole[: len(new)]:
            continue  # a beam search may prefer a text that ends, and then stop: lengths are judged by check_decoding
        expect_ended(row, new, whole, end)
    note(end=end, ended=[row.index(end) if end in row else None for row in base])
    advise_of_prompts_with_an_end(on)


def advise_of_prompts_with_an_end(on: Stage) -> None:
    """Advice if a prompt that contains the end token is not continued: texts often begin with that token, too."""
    prompts = on.prompts(2, 2, 3)
    want, end = on.naive(prompts, 3).tolist(), int(prompts[0, 0])
    if any(end in row for row in want):
        return
    try:
        got = on.greedy(prompts[:1], 3, end=on.decoder.end_value(end))
    except Exception:
        return
    if got[0] != want[0]:
        advise(
            f"{on.decoder.name} does not continue a prompt that contains the end token ({got[0]}): look for the end "
            "token among the new tokens only"
        )


def expect_ended(row: int, got: list[int], whole: list[int], end: int) -> None:
    at = whole.index(end) if end in whole else None
    if at is None and got != whole:
        early = f"stops after {len(got)} of {len(whole)} tokens because another row produced the end token {end}"
        other = f"never produced the end token {end}, but gives {got}, expected {whole} (as without an end token)"
        fail(
            f"row {row} {early if got == whole[: len(got)] else other}",
            likely=("stops-when-any-row-eos",),
            advice="Keep a finished flag for each row, and stop when all rows are finished.",
            row=row,
            got=got,
            without_end=whole,
        )
    if at is None or got == whole[:at]:  # continues as it should, or is cut off before the end token
        return
    kept, filled = got[: at + 1], got[at + 1 :]
    if kept != whole[: at + 1]:
        fail(
            f"row {row} gives {got}, and {whole} without an end token: they must be the same up to the end token {end}",
            advice="Let the end token only stop its row: do not change its logit or the tokens before it.",
            row=row,
            got=got,
        )
    if len(set(filled)) > 1:
        fail(
            f"row {row} produced the end token {end} as new token {at + 1} and continues with {filled}",
            likely=("continues-after-eos",),
            advice="Once a row has ended, replace its new tokens with the pad token.",
            row=row,
            end=end,
            after=filled,
        )


@needs(APPENDS)
def check_generate_leaves_prompt_and_weights(subject: Subject) -> None:
    """Generate must not change the prompt, its mask or the model's weights, not even by one bit."""
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
            f"the prompt was {rows} and is {left} after the call: {on.decoder.name} changes its argument in place",
            likely=("generate-mutates-prompt",),
            advice="Build the output with torch.cat or in a copy, without prompt[:, t] = … or prompt.append(…).",
            before=rows,
            after=left,
        )
    if given and not torch.equal(given["mask"].long(), was):
        fail(
            f"the mask was all ones and is {given['mask'].tolist()} after the call: {on.decoder.name} changes its "
            "argument in place",
            advice="Extend a copy with torch.cat((mask, ones), dim=1), without mask[:, t] = ….",
        )
    for name, value in on.model.named_parameters():
        if not torch.equal(value, weights[name]) and name not in renormalized(on.model):
            fail(
                f"{on.decoder.name} changed the parameter {name}",
                advice="Look for an in-place operation on a weight (a trailing underscore, +=): decoding only reads.",
                parameter=name,
            )


@needs(APPENDS)
def check_generate_restores_the_mode(subject: Subject) -> None:
    """A model in eval mode must decode without dropout, and a model in train mode must be in train mode afterwards."""
    on = stage(subject)
    prompts = subject.tokens(2, 3, seed=subject.seed)
    on.model.eval()
    on.generate(prompts, 3)
    if any(read.training for read in on.reads):
        fail(
            f"{on.decoder.name} decodes in train mode although the model was in eval mode: dropout is on",
            likely=("generate-without-eval",),
            advice="Call model.eval() before the loop, and restore the previous mode after it.",
        )
    expect_mode(on, False)
    on.model.train()
    on.generate(prompts, 3)
    if any(read.training for read in on.reads):
        advise(f"{on.decoder.name} decodes with dropout if the model is in train mode: call model.eval() before it")
    expect_mode(on, True)
    options = ends_early(on)
    if options:
        on.model.train()
        on.greedy(on.prompts(1, 3, 1), 3, **options)
        expect_mode(on, True, " that stopped early at an end token")


def expect_mode(on: Stage, training: bool, when: str = "") -> None:
    modules = [name or type(on.model).__name__ for name, m in on.model.named_modules() if m.training is not training]
    if not modules:
        return
    was, now = ("train", "eval") if training else ("eval", "train")
    fail(
        f"the model was in {was} mode, but {len(modules)} of its modules are in {now} mode after a call of "
        f"{on.decoder.name}{when}" + (": training continues without dropout" if training else ""),
        likely=("generate-leaves-eval-mode",),
        advice="Remember model.training, and restore it in a finally block.",
        modules=modules[:5],
    )


@needs(APPENDS)
def check_generate_keeps_no_graph(subject: Subject) -> None:
    """Generate must not keep the autograd graphs of earlier steps alive."""
    on, n = stage(subject), 6
    prompts = subject.tokens(1, max(1, min(3, subject.sizes.block_size - n)), seed=subject.seed)
    with torch.enable_grad(), graphs(on.model) as alive:
        on.generate(prompts, n)
    if not alive:
        raise NotApplicable("the model does not look its tokens up in an nn.Embedding")
    if alive[-1] > 3:
        fail(
            f"at step {len(alive)} the autograd graphs of {alive[-1]} steps are alive: memory grows with every token",
            likely=("generate-keeps-graph",),
            advice="Decorate generate with @torch.no_grad() or @torch.inference_mode().",
            alive=alive,
        )
    if alive[-1]:
        advise(f"{on.decoder.name} builds an autograd graph at each step: @torch.no_grad() saves time and memory")


@needs(APPENDS)
def check_generate_leaves_random_states(subject: Subject) -> None:
    """Generate may draw from the global random generators but must not seed them: that would repeat the random
    numbers of training.
    """
    on = stage(subject)
    prompts = subject.tokens(1, 2, seed=subject.seed)
    asked = [{}, *([{"seed": 5}] if "seed" in on.decoder.takes else [])]
    for options in asked:
        after = [state_after(on, prompts, seed, **options) for seed in (subject.seed + 11, subject.seed + 12)]
        rewound = [name for name in after[0] if after[0][name] == after[1][name] and name in SEEDED]
        if rewound:
            fail(
                f"the global random state of {' and '.join(rewound)} after {on.decoder.name} does not depend on the "
                f"state before: it is seeded inside{' by seed=5' if options else ''}, so every call repeats the random "
                "numbers of training (dropout, shuffling)",
                likely=("generate-reseeds-global-state", "seed-fixed-inside-generate"),
                advice="Draw with a torch.Generator of your own, or leave seeding to the caller.",
                states=rewound,
            )


SEEDED = ("PyTorch", "Python")


def state_after(on: Stage, prompts: Tensor, start: int, **options: Any) -> dict[str, bytes]:
    python = random.getstate()
    with torch_seeded(start):
        random.seed(start)
        try:
            on.generate(prompts, 3, **options)
            return states()
        finally:
            random.setstate(python)
