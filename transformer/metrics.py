"""Metrics of a training: one record after another, as JSON lines in a file or else in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


class Metrics:
    """Records of a training, appended to `path`, or kept in memory if it is None."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.memory: list[Record] = []

    def restart(self, step: int) -> None:
        """Forgets what was recorded after `step`: a training that resumes there records it again."""
        kept = [record for record in self.records() if record["step"] <= step]
        self.memory = [] if self.path else kept
        if self.path:
            self.path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, records: list[Record]) -> None:
        if self.path is None:
            self.memory += records
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def records(self) -> list[Record]:
        if self.path is None:
            return list(self.memory)
        return read_metrics(self.path) if self.path.exists() else []


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that was cut off midway is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that tensors held on a CUDA device, or that the whole process held; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
