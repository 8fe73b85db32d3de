"""A model trained by two processes under DistributedDataParallel, each with half of every batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..expect import NotApplicable
from ..loss.formula import cross_entropy
from ..subject import Subject, cast
from ..watch.dropout import set_rates
from .backward import backward
from .precision import precision

COUNT = 2
BATCHES = 3
SECONDS = 120  # for two processes to start, compute and end
UNUSED = "Expected to have finished reduction"  # in DistributedDataParallel's message about an unused parameter


CHILD = f"""
import sys, torch
from pathlib import Path
from {__name__} import main
from {__package__.rpartition(".")[0]}.run.subjects import subject_of
torch.set_num_threads(1)
main(Path(sys.argv[1]), int(sys.argv[2]), subject_of)
"""


class Refused(Exception):
    """What DistributedDataParallel, or the model within it, raised in the first process that failed."""


class Logits(nn.Module):
    """The call of the subject as a module, so that DDP gets logits whatever the model returns."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        super().__init__()
        self.subject, self.model = subject, model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.subject.logits(self.model, tokens)


def model_of(subject: Subject, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """A model in train mode without dropout, in the finest type in which it runs."""
    model = subject.build(seed=subject.seed)
    if weights is not None:
        model.load_state_dict(weights)
    model = cast(model, precision(subject).dtype).train()
    set_rates(model, 0.0)
    return model


def batches(subject: Subject) -> list[Tensor]:
    return [subject.tokens(2 * COUNT, subject.sizes.block_size, seed=subject.seed + i) for i in range(BATCHES)]


def gradients(network: nn.Module, model: nn.Module, given: list[Tensor]) -> list[dict[str, Tensor]]:
    """The gradient of the mean loss by parameter, for each batch at the same weights."""
    found = []
    for tokens in given:
        model.zero_grad(set_to_none=True)
        backward(cross_entropy(network(tokens[:, :-1]), tokens[:, 1:]).mean())
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return found


def train_in_two(subject: Subject, weights: dict[str, Tensor], folder: Path, *, unused: bool) -> list[Any]:
    """The gradients and final buffers of each process; `unused` lets DDP look for unused parameters.

    Raises Refused with the error of a process, and NotApplicable where a process cannot load the subject.
    """
    torch.save(dict(name=subject.name, seed=subject.seed, weights=weights, unused=unused), folder / "task.pt")
    command = [sys.executable, "-P", "-c", CHILD, str(folder)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    running = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        for rank in range(COUNT)
    ]
    try:
        wait_for(running)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if (unmet := folder / "unmet.txt").exists():
        raise NotApplicable("a new process cannot load this model", error=unmet.read_text())
    said = [path.read_text() for rank in range(COUNT) if (path := folder / f"{rank}.txt").exists()]
    if said:
        raise Refused(said[0])
    ends = [folder / f"{rank}.pt" for rank in range(COUNT)]
    if not all(end.exists() for end in ends):
        raise NotApplicable(f"two processes were killed, or did not end within {SECONDS} seconds")
    return [torch.load(end, weights_only=True) for end in ends]


def wait_for(running: list[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended or one has failed, for which the others would wait."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        codes = [process.poll() for process in running]
        if any(codes) or None not in codes:
            return
        time.sleep(0.05)


def main(folder: Path, rank: int, subject_of: Callable[..., Subject]) -> None:
    """One of the two processes."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    task = torch.load(folder / "task.pt", weights_only=True)
    try:
        subject = subject_of(task["name"], seed=task["seed"])
        model = model_of(subject, task["weights"])
    except Exception as error:  # no model has this name here, or another one
        (folder / "unmet.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    meeting = f"file://{folder / 'meeting'}"
    wait = timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=COUNT, timeout=wait)
    try:
        network = DistributedDataParallel(Logits(subject, model), find_unused_parameters=task["unused"])
        mine = [tokens.chunk(COUNT)[rank] for tokens in batches(subject)]
        found = gradients(network, model, mine)
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)  # without waiting for the other process
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    torch.save((found, buffers), folder / f"{rank}.pt.new")
    (folder / f"{rank}.pt.new").rename(folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads may abort a normal exit
