"""`make gpu`: all that needs CUDA, over the reference, in at most ten minutes; leaves a table in out/gpu.

python -m benchmarks.gpu [--device DEVICE] [--out FOLDER] [--minutes N] [-k WORDS]

On a machine without CUDA it says so and exits with 2; `--device cpu` is a dry run, and its table says that it is one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

from transformer_checks.checks.bugs import all_bugs

ROOT = Path(__file__).resolve().parent.parent
NO_DEVICE = 2  # exit code
WINDING_UP = 30  # seconds that a part has to write what it found when its time is over


@dataclass(frozen=True)
class Row:
    """One check, test or benchmark: passed, failed or skipped, and what it said."""

    part: str
    name: str
    outcome: str
    seconds: float
    says: str


def main() -> int:
    options = parse()
    device, out, until = options.device, Path(options.out), time.monotonic() + 60 * options.minutes
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no CUDA device here: the installed torch is {torch.__version__}", file=sys.stderr)
        return NO_DEVICE
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        row
        for part, arguments in parts(device, out, options.words).items()
        for row in run(part, arguments, out / f"{part}.xml", until)
    ]
    about = machine(device)
    (out / "table.md").write_text(table(about, rows), encoding="utf-8")
    lines = [about, *(asdict(row) for row in rows)]
    (out / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    bad = [row for row in rows if row.outcome not in ("passed", "skipped")]
    print(
        f"{len(rows)} rows in {out / 'table.md'}, {len(bad)} of them not passed: {', '.join(row.name for row in bad)}"
    )
    return int(bool(bad) or not rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="anything but cuda is a dry run")
    parser.add_argument("--out", default="out/gpu", metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("-k", dest="words", metavar="WORDS", help="only these checks and benchmarks, as pytest's -k")
    return parser.parse_args()


def parts(device: str, out: Path, words: str | None) -> dict[str, list[str]]:
    """The arguments of each run of pytest, the quickest first."""
    chosen = ["--device", device, "--seed", "0", *(["-k", words] if words else [])]
    shown_by_cuda = " or ".join(bug.id for bug in all_bugs().values() if bug.device == "cuda")
    return {
        "bugs": ["tests/test_bugs.py", "-k", shown_by_cuda],
        "checks": ["checks", *chosen, "--out", str(out), "--verdicts", str(out / "verdicts.jsonl")],
        "benchmarks": ["checks/bench_training.py", *chosen, "--benchmark-json", str(out / "benchmarks.json")],
    }


def run(part: str, arguments: list[str], report: Path, until: float) -> Iterator[Row]:
    """Runs pytest and reads its report; interrupted when the time is over, it still writes what it has."""
    report.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report.resolve()}", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
    )
    stopped = False
    try:
        process.wait(max(0.0, until - started - WINDING_UP))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGINT)
        try:
            process.wait(WINDING_UP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if report.exists():
        yield from read(part, report)
    if stopped or not report.exists():
        says = "its time was over" if stopped else f"pytest ended with exit code {process.returncode} and no report"
        yield Row(part, f"the rest of the {part}", "stopped", time.monotonic() - started, says)


def read(part: str, report: Path) -> Iterator[Row]:
    for case in ElementTree.parse(report).iter("testcase"):
        if not case.get("name"):  # the one that was interrupted
            continue
        says = [entry.get("value", "") for entry in case.iter("property") if entry.get("name") == "benchmark"]
        outcome = "passed"
        for tag, name in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
            for entry in case.iter(tag):
                outcome = name
                says.append(entry.get("message", ""))
        yield Row(part, case.attrib["name"], outcome, float(case.get("time", 0)), " ".join(" ".join(says).split()))


def machine(device: str) -> dict[str, object]:
    named = torch.cuda.get_device_name() if device == "cuda" else "the machine's own processor"
    return {
        "dry_run": device != "cuda",
        "device": device,
        "name": named,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(about: dict[str, object], rows: list[Row]) -> str:
    head = f"# {about['name']}, torch {about['torch']}, CUDA {about['cuda']}, {about['date']}"
    if about["dry_run"]:
        head = f"# DRY RUN on {about['device']}: nothing in this table was measured on CUDA"
    lines = [head, "", "| part | name | outcome | seconds | |", "|---|---|---|---|---|"]
    for row in rows:
        says = row.says.replace("|", "\\|")
        lines.append(f"| {row.part} | {row.name} | {row.outcome} | {row.seconds:.2f} | {says} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
