"""`make power`: every bug and every control against every check, in processes; a table as data, and POWER.md from it.

The table is out/power/CODE.jsonl, a line a subject and seed, CODE a fingerprint of the sources: a run that was stopped
goes on where it was, and after a change of the sources another table begins. Removing a table starts it over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from power.process import BUGS, CONTROLS, Task, run
from power.report import report, wrong

ROOT = Path(__file__).parent.parent
SOURCES = ("transformer", "checks", "tests/controls.py", "tests/variants.py")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 where a bug was missed or a control accused."""
    options = parse(arguments)
    table = options.report or options.out / f"{fingerprint()}.jsonl"
    if not options.report:
        tasks = [task for task in plan(options.seeds) if chosen(task, options.only)]
        print(f"{table}: {len(tasks)} rows; remove it to start over", flush=True)
        with interrupted_quietly():
            fill(table, tasks, options.jobs)
    rows = read(table)
    left = [task for task in plan(options.seeds) if tuple(asdict(task).values()) not in rows]
    text, sound = report(list(rows.values()), f"sources {table.stem}, torch {torch.__version__}", left=len(left))
    if options.only:
        print(text)
    else:
        options.markdown.write_text(text, encoding="utf-8")
    return 0 if sound else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="subjects at a time")
    parser.add_argument("--seeds", type=positive, default=20, help="seeds of each control; a bug has one")
    parser.add_argument("--only", default="", help="subjects whose kind or name has one of these words: 'bug mask'")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "power", help="folder of the tables")
    parser.add_argument("--markdown", type=Path, default=ROOT / "POWER.md", help="the report (not with --only)")
    parser.add_argument("--report", type=Path, metavar="TABLE", help="run nothing: the report of this table")
    options = parser.parse_args(arguments)
    if options.report and not options.report.exists():
        parser.error(f"no table is at {options.report}")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def fingerprint(root: Path = ROOT) -> str:
    """Ten digits of the sources that decide a verdict, and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (root / name for name in SOURCES):
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def plan(seeds: int) -> list[Task]:
    """What is soonest worth knowing first: every bug that a CPU shows, every control, more seeds, what is slow."""
    tasks = [Task("bug", name, 0) for name, bug in BUGS.items() if bug.device == "cpu"]
    tasks += [Task("control", name, seed) for seed in range(seeds) for name in CONTROLS]
    return tasks + [Task("control", name, 0, slow=True) for name in CONTROLS]


def chosen(task: Task, only: str) -> bool:
    return not only or any(word in f"{task.kind}:{task.subject}" for word in only.split())


def fill(table: Path, tasks: list[Task], jobs: int) -> None:
    """Runs what the table lacks, `jobs` subjects at a time, and writes each row as it comes."""
    done = {key for key, row in read(table).items() if not row["ended"]}
    left = [task for task in tasks if tuple(asdict(task).values()) not in done]
    table.parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(jobs)
    with progress(len(tasks), table.stem) as show, open(table, "a+", encoding="utf-8") as file:
        start_a_line(file)
        show(len(tasks) - len(left))
        for future in as_completed([pool.submit(run, task) for task in left]):
            row = future.result()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            show(1, row)


def start_a_line(file: Any) -> None:
    """A run that was killed may have left half a line."""
    file.seek(0)
    text = file.read()
    if text and not text.endswith("\n"):
        file.write("\n")


def read(table: Path) -> dict[tuple, dict[str, Any]]:
    """The rows by (kind, subject, seed, slow), the last of each; half a line is none."""
    rows: dict[tuple, dict[str, Any]] = {}
    for line in table.read_text(encoding="utf-8").splitlines() if table.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["kind"], row["subject"], row["seed"], row["slow"]] = row
    return rows


@contextmanager
def progress(total: int, title: str) -> Iterator[Any]:
    """A bar on a terminal, none in a pipe; what is wrong is a line in both, as soon as it is known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, disable=not sys.stdout.isatty())
    task = bar.add_task(title, total=total)

    def show(steps: int, row: dict[str, Any] | None = None) -> None:
        bar.update(task, advance=steps, description=row["subject"] if row else title)
        for line in wrong(row) if row else []:
            print(line, flush=True)

    with bar:
        yield show


@contextmanager
def interrupted_quietly() -> Iterator[None]:
    """What still runs ends with its next word: nobody listens any more."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
