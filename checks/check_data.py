"""Data: sequences as batches, which of them a training sees and when, and what its seeds decide."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .expect import NotApplicable, advise, fail, needs, note
from .loss.cases import named
from .loss.explained import misread_mask, spans
from .subject import Subject
from .training.runs import TrainerRun, examples, flat, model_of, needs_trainer
from .training.steps import step_leaves_random_states
from .watch.draws import seeded

SEQUENCES = [[3, 7, 11, 2, 9, 14, 5, 8], [6, 1, 13, 4], [12, 10, 15, 16, 3, 1]]  # lengths 8, 4, 6; no neighbours alike
END = 2  # a token id that ends a text, and pads in the check that says so
ALIGNED = "check_data.check_a_target_is_the_next_token"


def check_a_row_is_its_sequence(subject: Subject) -> None:
    """The real tokens of a row are its own sequence, in order, whichever side the padding is on."""
    for side, batch in padded(subject):
        for row, (sequence, real) in enumerate(zip(SEQUENCES, batch.mask, strict=True)):
            found = batch.tokens[row][real.bool()].tolist()
            if found != sequence[:-1]:
                at = next((i for i, (a, b) in enumerate(zip(found, sequence, strict=False)) if a != b), len(found))
                fail(
                    f"row {row} (padding on the {side}) holds {found}, its sequence is {sequence}: other from {at} on",
                    likely=("bptt-tail-mis-split",),
                    advice="Deal whole sequences to rows; what is left over makes a row of its own.",
                    row=row,
                    got=found,
                    want=sequence[:-1],
                )


def check_a_target_is_the_next_token(subject: Subject) -> None:
    """The target of a place is the token that follows the one read there in its sequence."""
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
                        ("the token just read: copying solves it", ("dataset-target-off-by-one",), sequence[:-1]),
                        ("the token after the next", ("dataset-target-off-by-one",), sequence[2:]),
                    )
                    if found[: n - 2] == other[: n - 2]
                ),
                ("another token", ()),
            )
            at = next((i for i, (a, b) in enumerate(zip(found, sequence[1:], strict=False)) if a != b), len(found))
            fail(
                f"row {row}, position {at} (padding on the {side}): the target is {[*found, 'none'][at]}, the token "
                f"that follows in {sequence} is {sequence[at + 1] if at + 1 < n else 'none'}; targets are {meaning}",
                likely=likely,
                advice="tokens = sequence[:-1], targets = sequence[1:].",
                got=found,
                want=sequence[1:],
            )


@needs(ALIGNED)
def check_the_loss_mask_drops_what_was_asked(subject: Subject) -> None:
    """Of every row the first `skip` targets carry no loss, nor does padding, and all others do."""
    for skip in range(4):
        for side, batch in padded(subject, skip=skip):
            for row, sequence in enumerate(SEQUENCES):
                real = len(sequence) - 1
                first = 0 if side == "right" else batch.tokens.shape[1] - real
                kept = {int(t) - first for t in batch.loss_mask[row].nonzero()}
                asked, dropped = set(range(skip)), set(range(real)) - kept
                if kept - set(range(real)):
                    fail(
                        f"row {row}, of {real} targets and padded on the {side}: "
                        f"{len(kept - set(range(real)))} targets of padding carry loss",
                        likely=("padding-counted",),
                        advice="A target that is padding carries no loss: mask & positions that are real.",
                    )
                if dropped != asked:
                    why, likely = misread_mask(asked, dropped, real)
                    fail(
                        f"row {row}, padded on the {side}: drops {named(sorted(dropped))}; asked for "
                        f"{spans(asked) or 'none'} (skip={skip}): {why}",
                        likely=likely if skip == 0 else ("loss-mask-skips-others", *likely),
                        advice="Target 0 is the first token that is predicted, the one after the begin token.",
                        asked=sorted(asked),
                        dropped=sorted(dropped),
                    )


@needs(ALIGNED)
def check_an_end_token_counts_though_it_pads(subject: Subject) -> None:
    """A target carries loss by its place: the end token of a text is learned although padding has the same id."""
    ended = [[*sequence, END] for sequence in SEQUENCES]
    batch = part(subject, "pad_batch")(ended, pad=END)
    for row, sequence in enumerate(ended):
        counted, want = int(batch.loss_mask[row].sum()), len(sequence) - 1
        if not batch.loss_mask[row, want - 1] or counted != want:
            fail(
                f"row {row}: {counted} targets of {want} carry loss when the padding has the id of the end token, "
                f"{END}; the end itself {'does' if batch.loss_mask[row, want - 1] else 'does not'}: the model never "
                "learns to stop",
                likely=("eos-masked-because-pad-is-eos",),
                advice="Mask by length, not by comparing ids with the pad.",
            )


@needs("check_training.check_a_step_follows_the_gradient")
def check_an_epoch_has_every_example_once(subject: Subject) -> None:
    """The windows of an epoch hold every example once, the odd rest included, and nothing else."""
    needs_trainer(subject)
    train, held_out, size = numbered(subject, range(7)), numbered(subject, range(7, 10)), 3
    run = TrainerRun(subject, model_of(subject), train, validation=held_out, batch_size=size)
    windows = [run.step().examples for _ in range(6)]
    if any(example in held_out for window in windows for example in window):
        fail(
            "examples of the validation split are trained on: its loss says nothing any more",
            likely=("data-validation-leak",),
            advice="Split first, then make windows from the training part alone.",
        )
    for epoch in range(2):
        given = [train.index(e) if e in train else -1 for window in windows[3 * epoch :][:3] for e in window]
        missing = [i for i in range(7) if i not in given]
        twice = [i for i in range(7) if given.count(i) > 1]
        if not missing and not twice and len(given) == 7:
            continue
        sizes = [len(window) for window in windows[3 * epoch :][:3]]
        says = (
            f"in epoch {epoch} (7 examples, {size} a step; windows of {sizes}) examples never trained on: "
            f"{spans(missing) or 'none'}; more than once: {spans(twice) or 'none'}"
        )
        if subject.declared("order") is None:
            advise(f"{says}: right if they are sampled with replacement, or the rest of an epoch is dropped on purpose")
            return
        fail(
            says,
            likely=likely_order(windows, size),
            advice="Draw a permutation for each epoch and go through it, the odd rest included.",
            missing=missing,
            twice=twice,
        )


def likely_order(windows: list[list], size: int) -> tuple[str, ...]:
    if all(a[-1] == b[0] for a, b in itertools.pairwise(windows[:3])):
        return ("data-window-stride-off-by-one",)
    distinct = all(a not in windows[1] for a in windows[0]) and all(w.count(e) == 1 for w in windows for e in w)
    if distinct and all(len(window) == size for window in windows):
        return ("data-last-window-dropped", "data-sampled-with-replacement")
    return ("data-sampled-with-replacement",)


def numbered(subject: Subject, numbers: Iterable[int]) -> list[list[int]]:
    """Examples of four tokens, no two alike: their number, in digits."""
    V = subject.sizes.vocab_size
    return [[n // V**2 % V, n // V % V, n % V, 0] for n in numbers]


@needs("check_data.check_an_epoch_has_every_example_once")
def check_the_order_changes_with_the_epoch(subject: Subject) -> None:
    """No two epochs have the same order."""
    needs_trainer(subject)
    run = TrainerRun(subject, model_of(subject), numbered(subject, range(11)), batch_size=4)
    orders = [[tuple(e) for _ in range(3) for e in run.step().examples] for _ in range(3)]
    if orders[0] == orders[1] or orders[1] == orders[2]:
        says = "two epochs in a row have the same order of 11 examples"
        if subject.declared("order") is None:
            advise(f"{says}: right only if the data is shuffled once on purpose")
            return
        fail(
            says,
            likely=("data-same-shuffle-every-epoch",),
            advice="Shuffle with one generator that goes on, or seed with seed + epoch.",
        )


def check_a_seed_decides_a_training(subject: Subject) -> None:
    """The same seed gives the same bits, whatever was drawn before; another seed gives another training."""
    if subject.brings("train_step") and not subject.brings("trainer"):
        step_leaves_random_states(subject)
        return
    needs_trainer(subject)
    ends = [trained(subject, seed=seed, before=before) for seed, before in ((1, 1), (1, 2), (2, 1))]
    if not torch.equal(ends[0], ends[1]):
        says = "two trainings with the same seed, order and weights end at other weights"
        if subject.declared("order") is None and torch.equal(ends[0], trained(subject, seed=1, before=1)):
            advise(f"{says} when other random numbers were drawn before: seed the generators first")
        else:
            fail(
                f"{says} (largest difference {float((ends[0] - ends[1]).abs().max()):.3g})",
                likely=("training-is-not-seeded",),
                advice="Draw order and dropout from states that the seed alone decides.",
            )
    if torch.equal(ends[0], ends[2]):
        fail(
            "two trainings with other seeds end at the same weights, dropout included: the seed decides nothing",
            likely=("seed-is-ignored",),
            advice="Hand the seed to the generators of order and dropout.",
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
    """Two processes of one training, told apart by rank alone, drop out other units."""
    needs_trainer(subject)
    ends = [of_rank(subject, rank) for rank in (0, 1, 1)]
    note(difference=float((ends[0] - ends[1]).abs().max()))
    if not torch.equal(ends[1], ends[2]):
        raise NotApplicable("the same rank does not give the same training twice")
    if torch.equal(ends[0], ends[1]):
        fail(
            "the processes of rank 0 and of rank 1 draw the same dropout: their noise does not average out",
            likely=("dataloader-workers-same-seed",),
            advice="Seed each process or worker with seed + rank.",
        )


def of_rank(subject: Subject, rank: int) -> Tensor:
    """A training step as the process of this rank makes it, alone with all the examples."""
    import transformer_checks.transformer.trainer as ours

    class Alone(ours.distributed.SingleProcess):
        pass

    Alone.rank = rank
    processes = ours.distributed.processes
    ours.distributed.processes = Alone
    try:
        run = TrainerRun(subject, model_of(subject, dropout=0.3), examples(subject, 4, longest=6), batch_size=4)
        if getattr(getattr(run.trainer, "processes", None), "rank", None) != rank:
            raise NotApplicable("the trainer does not know processes by rank")
        run.step()
    finally:
        ours.distributed.processes = processes
    return flat(run.model)


def part(subject: Subject, name: str) -> Callable:
    found = subject.part(name)
    if found is None:
        raise NotApplicable(f"the subject brings no {name}")
    return found


def padded(subject: Subject, **options: Any) -> list[tuple[str, Any]]:
    """The batch of SEQUENCES with padding on either side."""
    pad_batch = part(subject, "pad_batch")
    return [(side, pad_batch(SEQUENCES, side=side, **options)) for side in ("right", "left")]
