"""Data: batches made from sequences, the order of examples in training, and what the seed determines."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .expect import NotApplicable, Where, advise, fail, needs, note, shown
from .loss.explained import misread_mask, named, spans
from .probes.filled import judged
from .subject import Companion, Subject
from .training.met_tokenizer import TEXT, WORDS, MetTokenizer, merged, merges_of, some_words
from .training.pairing import batches, reader
from .training.runs import Example, TrainerRun, examples, flat, model_of, needs_trainer, step_of_rank
from .training.steps import step_leaves_random_states
from .watch.draws import seeded

SEQUENCES = [
    [3, 7, 11, 2, 9, 14, 5, 8],
    [6, 1, 13, 4],
    [12, 10, 15, 16, 3, 1],
]  # lengths 8, 4, 6; no two equal neighbours
END = 2  # the end token, which is also the padding in check_an_end_token_counts_though_it_pads
ALIGNED = "check_data.check_a_target_is_the_next_token"


def check_a_row_is_its_sequence(subject: Subject) -> None:
    """The real tokens of each row of a batch must be its own sequence, in order, with padding on either side."""
    for side, batch in padded(subject):
        for row, (sequence, real) in enumerate(zip(SEQUENCES, batch.mask, strict=True)):
            found = batch.tokens[row][real.bool()].tolist()
            if found != sequence[:-1]:
                at = next((i for i, (a, b) in enumerate(zip(found, sequence, strict=False)) if a != b), len(found))
                fail(
                    f"row {row} (padding on the {side}) is {found}, expected {sequence[:-1]}: they differ from "
                    f"position {at} on",
                    likely=("bptt-tail-mis-split",),
                    advice="Put each sequence into one row, and what is left over into a row of its own.",
                    row=row,
                    got=found,
                    want=sequence[:-1],
                )


def check_a_target_is_the_next_token(subject: Subject) -> None:
    """The target at each position must be the next token of the sequence."""
    for side, batch in padded(subject):
        for row, (sequence, real) in enumerate(zip(SEQUENCES, batch.mask, strict=True)):
            found = batch.targets[row][real.bool()].tolist()
            if found == sequence[1:]:
                continue
            n = len(sequence)
            meaning, likely = next(
                (
                    (says, likely)
                    for says, likely, other in (
                        (
                            "the token just read, which the model only has to copy",
                            ("dataset-target-off-by-one",),
                            sequence[:-1],
                        ),
                        ("the token after next", ("dataset-target-off-by-one",), sequence[2:]),
                    )
                    if found[: n - 2] == other[: n - 2]
                ),
                ("another token", ()),
            )
            at = next((i for i, (a, b) in enumerate(zip(found, sequence[1:], strict=False)) if a != b), len(found))
            fail(
                f"row {row}, position {at} (padding on the {side}): the target is {[*found, 'none'][at]}, expected "
                f"{sequence[at + 1] if at + 1 < n else 'none'} (the sequence is {sequence}); the targets are {meaning}",
                likely=likely,
                advice="Use tokens = sequence[:-1] and targets = sequence[1:].",
                got=found,
                want=sequence[1:],
            )


@needs("check_loss.check_a_place_is_trained_on_its_own_target")
def check_batch_and_loss_train_on_the_next_token(subject: Subject) -> None:
    """What makes batches and what trains on them must shift the targets by one place in all."""
    made, trains = batches(subject), reader(subject)
    note(batches={batch.maker: batch.shift for batch in made}, trains=trains.says, shift=trains.shift)
    if any(batch.shift + trains.shift == 1 for batch in made if batch.shift is not None):
        return
    batch = made[0]
    row, later = batch.tokens[0].tolist(), trains.shift
    targets = batch.targets[0].tolist()
    fail(
        f"{batch.maker} shifts its targets by {batch.shift} and {trains.says} shifts them by {later}, should be 1 in "
        f"all: the logits of each token are trained on {trains.meaning(batch)}",
        where=Where(batch.maker, "batch", shown(batch.file), batch.line) if batch.file else None,
        likely=("dataset-target-off-by-one",) if later == 0 else ("batch-and-loss-both-shift",),
        advice="Shift once: either in the batch (x = data[i : i + T], y = data[i + 1 : i + 1 + T]) with a loss of "
        "logits and targets as they are, or in the loss (logits[:, :-1], targets[:, 1:]) with targets = tokens.",
        tokens=row,
        targets=targets,
    )


@needs(ALIGNED)
def check_the_loss_mask_drops_what_was_asked(subject: Subject) -> None:
    """The loss mask must drop the first `skip` targets of every row and the padding, and nothing else."""
    for skip in range(4):
        for side, batch in padded(subject, skip=skip):
            for row, sequence in enumerate(SEQUENCES):
                real = len(sequence) - 1
                first = 0 if side == "right" else batch.tokens.shape[1] - real
                kept = {int(t) - first for t in batch.loss_mask[row].nonzero()}
                asked, dropped = set(range(skip)), set(range(real)) - kept
                if kept - set(range(real)):
                    fail(
                        f"row {row}, with {real} targets and padded on the {side}: "
                        f"{len(kept - set(range(real)))} padding targets are in the loss",
                        likely=("padding-counted",),
                        advice="Combine the loss mask with the mask of real tokens: loss_mask & mask.",
                    )
                if dropped != asked:
                    why, likely = misread_mask(asked, dropped, real)
                    fail(
                        f"row {row}, padded on the {side}: the loss mask drops {named(sorted(dropped))}, expected "
                        f"{named(asked)} (skip={skip}): {why}",
                        likely=likely if skip == 0 else ("loss-mask-skips-others", *likely),
                        advice="Count targets from 0: target 0 is the first predicted token, after the begin token.",
                        asked=sorted(asked),
                        dropped=sorted(dropped),
                    )


@needs(ALIGNED)
def check_an_end_token_counts_though_it_pads(subject: Subject) -> None:
    """The end token of a text must be in the loss even if padding has the same id."""
    ended = [[*sequence, END] for sequence in SEQUENCES]
    batch = batches_of(subject)(ended, pad=END)
    for row, sequence in enumerate(ended):
        counted, want = int(batch.loss_mask[row].sum()), len(sequence) - 1
        end_counts = bool(batch.loss_mask[row, want - 1])
        if not end_counts or counted != want:
            fail(
                f"row {row}: {counted} of {want} targets are in the loss when padding has the id of the end token "
                f"({END})" + ("" if end_counts else ": the end token is masked, so the model never learns to stop"),
                likely=("eos-masked-because-pad-is-eos",),
                advice="Mask padding by the length of each row, not by comparing ids with the pad id.",
            )


@needs("check_training.check_a_step_follows_the_gradient")
def check_an_epoch_has_every_example_once(subject: Subject) -> None:
    """Every epoch must contain each training example exactly once, including those that do not fill a batch."""
    needs_trainer(subject)
    train, held_out, size = numbered(subject, range(7)), numbered(subject, range(7, 10)), 3
    run = TrainerRun(subject, model_of(subject), train, validation=held_out, batch_size=size)
    windows = [run.step().examples for _ in range(6)]
    if any(example in held_out for window in windows for example in window):
        fail(
            "the model is trained on examples of the validation split, so the validation loss is meaningless",
            likely=("data-validation-leak",),
            advice="Split first, then make batches from the training part only.",
        )
    for epoch in range(2):
        given = [train.index(e) if e in train else -1 for window in windows[3 * epoch :][:3] for e in window]
        missing = [i for i in range(7) if i not in given]
        twice = [i for i in range(7) if given.count(i) > 1]
        if not missing and not twice and len(given) == 7:
            continue
        sizes = [len(window) for window in windows[3 * epoch :][:3]]
        says = (
            f"in epoch {epoch} (7 examples, {size} per step; steps with {sizes} examples), never used: "
            f"{spans(missing) or 'none'}; used more than once: {spans(twice) or 'none'}"
        )
        if subject.declared("order") is None:
            advise(f"{says}: correct if you sample with replacement or drop the last batch on purpose")
            return
        fail(
            says,
            likely=likely_order(windows, size),
            advice="Draw a permutation for each epoch and use all of it, including a smaller last batch.",
            missing=missing,
            twice=twice,
        )


def likely_order(windows: list[list[Example]], size: int) -> tuple[str, ...]:
    if all(a[-1] == b[0] for a, b in itertools.pairwise(windows[:3])):
        return ("data-window-stride-off-by-one",)
    distinct = all(a not in windows[1] for a in windows[0]) and all(w.count(e) == 1 for w in windows for e in w)
    if distinct and all(len(window) == size for window in windows):
        return ("data-last-window-dropped", "data-sampled-with-replacement")
    return ("data-sampled-with-replacement",)


def numbered(subject: Subject, numbers: Iterable[int]) -> list[list[int]]:
    """Examples of four tokens, all different: a number in base V, then 0."""
    V = subject.sizes.vocab_size
    return [[n // V**2 % V, n // V % V, n % V, 0] for n in numbers]


@needs("check_data.check_an_epoch_has_every_example_once")
def check_the_order_changes_with_the_epoch(subject: Subject) -> None:
    """Two epochs in a row must not have the same order."""
    needs_trainer(subject)
    run = TrainerRun(subject, model_of(subject), numbered(subject, range(11)), batch_size=4)
    orders = [[tuple(e) for _ in range(3) for e in run.step().examples] for _ in range(3)]
    if orders[0] == orders[1] or orders[1] == orders[2]:
        says = "two epochs in a row have the same order of 11 examples"
        if subject.declared("order") is None:
            advise(f"{says}: correct only if you shuffle once on purpose")
            return
        fail(
            says,
            likely=("data-same-shuffle-every-epoch",),
            advice="Shuffle with one generator for all epochs, or seed with seed + epoch.",
        )


def check_a_seed_decides_a_training(subject: Subject) -> None:
    """The same seed must give the same weights bit for bit, whatever was drawn before; another seed must not."""
    if subject.brings("train_step") and not subject.brings("trainer"):
        step_leaves_random_states(subject)
        return
    needs_trainer(subject)
    ends = [trained(subject, seed=seed, before=before) for seed, before in ((1, 1), (1, 2), (2, 1))]
    if not torch.equal(ends[0], ends[1]):
        says = "two training runs with the same seed, data and initial weights end with different weights"
        if subject.declared("order") is None and torch.equal(ends[0], trained(subject, seed=1, before=1)):
            advise(f"{says} if other random numbers were drawn before: seed the generators first")
        else:
            fail(
                f"{says} (largest difference {float((ends[0] - ends[1]).abs().max()):.3g})",
                likely=("training-is-not-seeded",),
                advice="Draw the order and dropout from generators that depend on the seed alone.",
            )
    if torch.equal(ends[0], ends[2]):
        fail(
            "two training runs with different seeds end with the same weights, even with dropout: the seed is ignored",
            likely=("seed-is-ignored",),
            advice="Pass the seed to the generators of the order and of dropout.",
        )


def trained(subject: Subject, *, seed: int, before: int) -> Tensor:
    with seeded(before):
        run = TrainerRun(
            subject, model_of(subject, dropout=0.3), examples(subject, 6, longest=6), batch_size=4, seed=seed
        )
        for _ in range(3):
            run.step()
    return flat(run.model)


def check_processes_draw_from_streams_of_their_own(subject: Subject) -> None:
    """Two processes of the same training run, which differ only in rank, must draw different dropout masks."""
    needs_trainer(subject)
    ends = [step_of_rank(subject, rank) for rank in (0, 1, 1)]
    note(difference=float((ends[0] - ends[1]).abs().max()))
    if not torch.equal(ends[1], ends[2]):
        raise NotApplicable("a step of the same rank does not give the same weights twice")
    if torch.equal(ends[0], ends[1]):
        fail(
            "the processes with rank 0 and rank 1 draw the same dropout masks, so their noise does not average out",
            likely=("dataloader-workers-same-seed",),
            advice="Seed each process or worker with seed + rank.",
        )


def batches_of(subject: Subject) -> Callable[..., Any]:
    """The subject's pad_batch. Raises NotApplicable if it has none."""
    pad_batch: Callable[..., Any] | None = subject.part("pad_batch")
    if pad_batch is None:
        raise NotApplicable("no function that makes batches was found in your file")
    return pad_batch


def padded(subject: Subject, **options: Any) -> list[tuple[str, Any]]:
    """The batch of SEQUENCES with padding on either side."""
    pad_batch = batches_of(subject)
    return [(side, pad_batch(SEQUENCES, side=side, **options)) for side in ("right", "left")]


# -- tokenizers of a file

BACK = "check_data.check_a_tokenizer_gives_back_its_text"


def check_a_tokenizer_gives_back_its_text(subject: Subject) -> None:
    """Decoding what a tokenizer encodes must give the text, from ids below the vocabulary size, the same each time."""
    note(judged=judged(subject, "tokenizer", judge=lambda one: expect_back(subject, one)))


def expect_back(subject: Subject, one: Companion) -> int:
    met = subject.once(MetTokenizer, one)
    if len(met.ids("a")) == len(met.ids("abcba" * 3)):
        raise NotApplicable("it pads or cuts every text to one length")
    lossy, (before, after) = "", framed(met)
    for text in probes(met):
        ids = met.ids(text)
        expect_ids(met, text, ids)
        got = str(met.decode(met.encode(text)))
        if got in (text, before + text + after):
            continue
        if not met.per_character and loose(got) == loose(before + text + after):
            lossy = lossy or f"{one.name} does not keep spaces and cases: {shortly(text)} comes back as {shortly(got)}"
            continue
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(got, text, strict=False)))
        fail(
            f"{one.name} encodes {shortly(text)} as {ids[:12]}{' …' if len(ids) > 12 else ''} and decodes that as "
            f"{shortly(got)}, first wrong at character {same}",
            where=one.where,
            likely=(mistaken(text, got),),
            advice="decode must undo encode: build both tables from one list of symbols, join without spaces, and turn "
            "bytes into text only when all are joined.",
            text=text,
            got=got,
        )
    if lossy:
        advise(lossy)
    return len(met.known)


def framed(met: MetTokenizer) -> tuple[str, str]:
    """What it puts around each text, as its decode shows it."""
    before, a, after = (met.back("a") or "a").partition("a")
    return (before, after) if a else ("", "")


def probes(met: MetTokenizer) -> list[str]:
    """Texts of what it knows: each character, repeats, spaces at the ends, words that it has and has not seen."""
    known, draw = met.known, random.Random(met.subject.seed)
    drawn = ["".join(draw.choices(known, k=24)) for _ in range(6)]
    ours = ["".join(c for c in text if c in known) for text in (TEXT, "aab  bbb\n\ncc", " a b ", "abba" * 5)]
    texts = (*known, *ours, *some_words(1, 20), *drawn)
    return sorted((text for text in texts if text and set(text) <= set(known)), key=len)


def mistaken(text: str, got: str) -> str:
    """The known bug that looks most like it."""
    if loose(text) == loose(got):
        return "tokenizer-decodes-with-spaces"
    if not text.isascii():
        return "tokenizer-decodes-bytes-one-by-one"
    return "tokenizer-drops-repeats" if len(got) < len(text) else "tokenizer-decodes-off-by-one"


def expect_ids(met: MetTokenizer, text: str, ids: list[int]) -> None:
    one, size = met.companion, met.size
    wrong = [i for i in ids if i < 0 or (size is not None and i >= size)]
    if wrong:
        fail(
            f"{one.name} encodes {shortly(text)} with the id {wrong[0]}, should be below its vocabulary size {size}",
            where=one.where,
            likely=("tokenizer-vocabulary-too-small",),
            advice="Count every symbol into vocab_size, special tokens too: it is the size of the embedding.",
            id=wrong[0],
            size=size,
        )
    again = met.ids(text)
    if again != ids:
        fail(
            f"{one.name} encodes {shortly(text)} as {ids[:12]}, and the next time as {again[:12]}",
            where=one.where,
            likely=("tokenizer-remembers",),
            advice="encode must not change the tables or the merges: work on a copy.",
        )


def loose(text: str) -> str:
    return "".join(text.split()).lower()


def shortly(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


@needs(BACK)
def check_merges_are_applied_in_the_order_learned(subject: Subject) -> None:
    """A tokenizer with merges must apply them in the order in which they were learned, each wherever it fits."""
    note(judged=judged(subject, "tokenizer", judge=lambda one: expect_merges(subject, one)))


def expect_merges(subject: Subject, one: Companion) -> int:
    met = subject.once(MetTokenizer, one)
    ranked, count = merges_of(met), 0
    for word in (*WORDS, *some_words(1, 60)):
        ids = met.ids(word)
        got: list[Any] = ids if ranked.of_ids else [met.decode([i]) for i in ids]
        want: list[Any] = [met.ids(c)[0] for c in word] if ranked.of_ids else list(word)
        for pair, into in ranked.merges:
            want = merged(want, pair, into)
        if got != want:
            right = [met.decode([i]) for i in want] if ranked.of_ids else want
            fail(
                f"{one.name} encodes {word!r} as {' + '.join(met.decode([i]) for i in ids)}, should be "
                f"{' + '.join(right)}: its merges in the order in which they were learned",
                where=one.where,
                likely=("merges-from-the-left", "merges-only-once"),
                advice="Of all neighbours, merge the pair that was learned first, everywhere, until none is left.",
                word=word,
            )
        count += len(got) < len(word)
    return count
