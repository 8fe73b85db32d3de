"""Metrics of a training: one record after another, as JSON lines in a file or else in memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

Record = dict[str, Any]


class Metrics:
    """Records of a training, written to `path`, or kept in memory if it is None.

    A record's tensors stay on their device until `read`, which waits for it once for all of them.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.file: TextIO | None = None
        self.memory: list[Record] = []
        self.unread: list[Record] = []

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Records go to the file within. What was recorded after `step` is forgotten; with step 0, everything."""
        kept = [record for record in self.records() if 0 < step and record["step"] <= step]
        self.memory.clear()
        if self.path is not None:
            self.file = open(self.path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115, closed below
        try:
            self.write(kept)
            yield
        finally:
            if self.file is not None:
                with suppress(OSError):  # every line is on its way already, or its own error has been raised
                    self.file.close()
            self.file = None

    def add(self, **record: Any) -> None:
        self.unread.append({name: value for name, value in record.items() if value is not None})

    def read(self) -> list[Record]:
        """Writes what was added since the last reading, and returns it with numbers for tensors."""
        added, self.unread = self.unread, []
        places = [(record, name) for record in added for name, value in record.items() if isinstance(value, Tensor)]
        for (record, name), number in zip(places, numbers([record[name] for record, name in places]), strict=True):
            record[name] = number
        self.write(added)
        return added

    def write(self, records: Iterable[Record]) -> None:
        if self.file is None:
            self.memory += records
            return
        try:
            self.file.writelines(json.dumps(without_nan(record)) + "\n" for record in records)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def records(self) -> list[Record]:
        if self.path is None:
            return list(self.memory)
        return read_metrics(self.path) if self.path.exists() else []


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off midway is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Of zero-dimensional tensors, at the price of one wait for their device."""
    return torch.stack(list(tensors)).tolist() if tensors else []


def without_nan(record: Record) -> Record:
    """JSON has no word for what is not finite but null."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in record.items()}


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors held on a CUDA device, elsewhere that the whole process held; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
