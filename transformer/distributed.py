"""One process or several: who takes which examples, and how what each computes is put together.

Several processes are started by torchrun. PyTorch's DistributedDataParallel averages their gradients.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

PATIENCE = timedelta(minutes=10)  # how long a process waits for the others


class ProcessLost(RuntimeError):
    """Another process of the training has ended, or does not answer."""


class SingleProcess:
    """Training in this process alone."""

    rank, count = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to train through: its gradients are averaged over the processes."""
        return model

    def share(self, examples: Sequence[Any]) -> tuple[Sequence[Any], float]:
        """This process's part of the examples, and the weight of their losses."""
        return examples, 1.0

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each value added up over the processes."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag

    def without_averaging(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Gradients add up in each process, to be averaged by a later backward pass outside."""
        return nullcontext()


class ProcessGroup(SingleProcess):
    """Training in several processes, each with every `count`-th example of a window."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)

    def share(self, examples: Sequence[Any]) -> tuple[Sequence[Any], float]:
        """A process that gets none takes the first with weight 0: only all of them together can average."""
        mine = examples[self.rank :: self.count]
        return (mine, 1.0) if mine else (examples[:1], 0.0)

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        sums = torch.stack([value.double() for value in values])
        distributed.all_reduce(sums)
        return sums.unbind()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def without_averaging(self, network: nn.Module) -> AbstractContextManager[Any]:
        waiting: AbstractContextManager[Any] = network.no_sync()  # type: ignore[operator]
        return waiting


def processes() -> SingleProcess:
    """Those that train together now."""
    return ProcessGroup() if distributed.is_available() and distributed.is_initialized() else SingleProcess()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did; on CUDA each takes the device of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    with terminated_by_torchrun():
        yield
        if distributed.get_backend() == "gloo":
            part()
    distributed.destroy_process_group()  # not after an error: the others may never come


def part() -> None:
    """Waits for the others, then lets gloo's threads drop their tensors: an interpreter that ends meanwhile aborts.

    DistributedDataParallel keeps the process group, and so these threads, beyond its end.
    Raises ProcessLost when another process has ended already.
    """
    try:
        distributed.barrier()
    except RuntimeError as error:
        if not lost_another_process(error):
            raise
        finish_by_itself()
        raise ProcessLost(f"another process ended before all were done: {error}") from error
    time.sleep(0.05)  # each drop needs Python's lock, which this thread would hold to the end


@contextmanager
def terminated_by_torchrun() -> Iterator[None]:
    """torchrun terminates the other processes when one has died: they say so rather than vanish."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        finish_by_itself()
        raise ProcessLost("terminated, as torchrun does when another process has ended")

    before = signal.signal(signal.SIGTERM, stop)
    yield  # after an error the process ends, and says why, without being terminated on the way
    signal.signal(signal.SIGTERM, before)


def finish_by_itself() -> None:
    """From here on torchrun's signal does not cut off the last words of this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # says gloo


def lost_another_process(error: BaseException) -> bool:
    """Whether this is why the error came."""
    return isinstance(error, ProcessLost | distributed.DistError) or any(words in str(error) for words in LOST)
