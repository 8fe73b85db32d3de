"""Processor seconds and peak memory of a default run over models of several sizes, before and now, in turn.

python -m benchmarks.suite [--nanogpt FOLDER] [--before PYTHON] [--rounds N] [--only WORDS]; `make bench` runs it too.
`--before` is the Python of an environment in which an earlier version is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 900.0  # seconds by the clock after which a run is stopped
INSTANCE = """
import torch
from transformers import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size={vocab_size}, n_positions={block_size}, n_layer={n_layer},
                                   n_head={n_head}, n_embd={n_embd}, bos_token_id=0, eos_token_id=0))
"""
SIZES = {
    "10.7 M instance": dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "124 M instance": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
}


@dataclass
class Run:
    """One command as a whole process."""

    seconds: float  # of a processor
    memory: float  # peak, in bytes; at least that of the process which started it
    ended: str  # the last line that says how the checks ended


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'default run over':<22} {'now':>8} {'memory':>9} {'before':>9} {'now / before':>13}   verdicts")
        for name, where, what, alone in subjects(Path(folder), options.nanogpt):
            if options.only and options.only not in name:
                continue
            idle = process(alone, where).memory if alone else 0.0
            now, before = [], []
            for _ in range(options.rounds):
                if options.before:
                    before.append(run(options.before, what, where))
                now.append(run(sys.executable, what, where))
            print(line(name, now, before, idle), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nanogpt", metavar="FOLDER", help="a clone of nanoGPT, whose model.py is skipped without it")
    parser.add_argument("--before", metavar="PYTHON", help="of an environment with an earlier version")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, of which the median is shown (1)")
    parser.add_argument("--only", metavar="WORDS", help="of a subject's name")
    return parser.parse_args()


def subjects(folder: Path, nanogpt: str | None) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Name, folder to run in, `--model`, and for an instance the command of a process that only holds it."""
    yield "the reference", folder, "transformer", []
    if nanogpt is None:
        print("nanoGPT skipped: no folder given (make bench NANOGPT=folder)")
    else:
        yield "nanoGPT's model.py", Path(nanogpt), "model.py", []
    yield "transformers' GPT-2", folder, "transformers:GPT2LMHeadModel", []
    for name, sizes in SIZES.items():
        file = folder / f"{name.partition(' ')[0].replace('.', '_')}.py"
        file.write_text(INSTANCE.format(**sizes), encoding="utf-8")
        yield name, folder, f"{file.name}:model", [sys.executable, str(file)]


def run(python: str, what: str, where: Path) -> Run:
    options = ["--seed", "0", "--out", tempfile.mkdtemp(dir=tempfile.gettempdir()), "-q", "-p", "no:cacheprovider"]
    return process([python, "-m", "pytest", "--noconftest", "--model", what, *options], where)


def process(command: list[str], where: Path) -> Run:
    """Runs a command to its end, or for as long as our patience lasts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile() as output:
        patient = ["timeout", str(PATIENCE), *command]
        child = subprocess.Popen(patient, cwd=where, env=environment, stdout=output, stderr=output)
        _, code, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(code)
        output.seek(0)
        said = output.read().decode("utf-8", "replace").splitlines()
    # Earlier versions did not count the slow checks, which do not run, as skipped.
    ended = next(
        (text for text in reversed(said) if re.search(r"of \d+ checks ran", text)), f"ended with {child.returncode}"
    )
    ended = re.sub(r", \d+ skipped", "", ended)
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, ended)


def line(name: str, now: list[Run], before: list[Run], idle: float) -> str:
    seconds = statistics.median(run.seconds for run in now)
    memory = max(run.memory for run in now) - idle
    beside = f"{memory / 1e9:.2f} GB"
    text = f"{name:<22} {seconds:>6.1f} s {beside:>9}"
    if before:
        earlier = statistics.median(run.seconds for run in before)
        text += f" {earlier:>7.1f} s {seconds / earlier:>13.2f}"
        text += "   equal" if before[-1].ended == now[-1].ended else f"   {now[-1].ended} (before: {before[-1].ended})"
        return text
    return f"{text} {'':>9} {'':>13}   {now[-1].ended}"


if __name__ == "__main__":
    main()
