"""Data-parallel training: the averaged gradient of two processes must be that of one process with the whole batch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from .expect import Bound, NotApplicable, advise, expect_close, fail, needs, note, slow
from .probes import two_processes
from .probes.precision import precision
from .probes.two_processes import Logits, Refused, batches, gradients, model_of, train_in_two
from .subject import Subject
from .watch.draws import seeded

WHOLE = "two processes with half a batch each average to a different gradient than one process with the whole batch"


@slow("two new processes")
@needs(
    "check_contract.check_logits_have_shape",
    "check_gradients.check_every_parameter_gets_a_gradient",
    "check_gradients.check_rows_get_their_own_gradient",
)
def check_two_processes_train_as_one(subject: Subject) -> None:
    """Two DistributedDataParallel processes with half a batch each must get the gradient of one with all of it."""
    if not distributed.is_available():
        raise NotApplicable("this build of torch has no torch.distributed")
    if subject.device.type != "cpu":
        raise NotApplicable("two processes are tried only on the CPU")
    if not subject.builds_afresh:
        raise NotApplicable("a model given as an instance cannot be rebuilt in a new process")
    model = model_of(subject)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with seeded(subject.seed):
        want = gradients(Logits(subject, model), model, batches(subject))
    refuse_chance(subject, weights, want)
    found = in_two(subject, weights, want)
    ends = [buffers for _, buffers in found]
    parted = [name for name, b in ends[0].items() if not torch.equal(b, ends[1][name])]
    if parted:
        advise(f"the processes end with different {', '.join(parted[:4])}, which their batches change")
    factor = 1e-9 if precision(subject).inside == torch.float64 else 1e-4
    largest = max(float(g.abs().max()) for batch in want for g in batch.values())
    note(parted_buffers=parted, bound=factor * largest)
    for number, expected in enumerate(want, start=1):
        for rank, (got, _) in enumerate(found):
            expect_whole(
                got[number - 1],
                expected,
                number,
                rank,
                parted,
                Bound(factor * largest, f"{factor:.0e} of the largest gradient"),
            )


def refuse_chance(subject: Subject, weights: dict[str, Tensor], want: list[dict[str, Tensor]]) -> None:
    """Raises NotApplicable if training is random without dropout: each process would draw for itself."""
    model = model_of(subject, weights)
    with seeded(subject.seed + 1):
        again = gradients(Logits(subject, model), model, batches(subject))
    for one, other in zip(want, again, strict=True):
        if one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one):
            continue
        raise NotApplicable("training draws random numbers even without dropout")


def in_two(subject: Subject, weights: dict[str, Tensor], want: list[dict[str, Tensor]]) -> list[Any]:
    """What each process found. Advises where some batches leave a parameter unused, fails where all do."""
    try:
        return attempt(subject, weights, unused=False)
    except Refused as error:
        if two_processes.UNUSED not in str(error):
            fail(
                f"under DistributedDataParallel the model raises {str(error)[:300]}",
                likely=("parameter-never-used",),
                advice="do everything in forward: DDP calls no other method of the model",
            )
    every = {name for name, p in model_of(subject).named_parameters() if p.requires_grad}
    never = sorted(every - set().union(*want))
    if never:
        fail(
            f"under DistributedDataParallel the second step raises, because DDP waits for the gradient of "
            f"{', '.join(never[:4])}, which forward does not use",
            likely=("parameter-never-used",),
            advice="remove parameters that forward does not use, or freeze them (requires_grad_(False))",
            parameters=never,
        )
    advise("some batches leave parameters unused, so DistributedDataParallel needs find_unused_parameters=True")
    return attempt(subject, weights, unused=True)


def attempt(subject: Subject, weights: dict[str, Tensor], *, unused: bool) -> list[Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return train_in_two(subject, weights, Path(folder), unused=unused)


def expect_whole(
    got: dict[str, Tensor], want: dict[str, Tensor], number: int, rank: int, parted: list[str], bound: Bound
) -> None:
    kept = f" ({', '.join(parted[:4])} differs between the processes)" if parted else ""
    for name, gradient in want.items():
        expect_close(
            got.get(name, torch.zeros_like(gradient)),
            gradient,
            bound=bound,
            says=f"{WHOLE}: batch {number}, process {rank}, {name}{kept}",
            axes=[f"index {axis}" for axis in range(gradient.dim())],
            likely=("running-statistics-in-forward",) if parted else ("normalized-over-the-batch",),
            advice="let forward neither keep statistics of its batches nor mix rows: each process sees other rows",
        )
