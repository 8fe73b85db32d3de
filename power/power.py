"""`make power`: judges every known bug and every correct model with every check, and writes the report POWER.md.

Once every row is there it also writes checks/run/strength.json, by which checks are put in order.

The results are in out/power/CODE.jsonl, one line per subject and seed, where CODE is a fingerprint of the sources. A
run that was stopped continues where it was; after a change of the sources a new table is begun. Delete a table to start
over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from power import strength
from power.process import BUGS, Task, run
from power.report import problems, report
from tests.controls import CONTROLS

ROOT = Path(__file__).parent.parent
Key = tuple[Any, ...]  # the fields of a Task: kind, subject, seed, slow
SOURCES = ("transformer", "checks", "tests/controls.py", "tests/variants.py", "tests/variants_of_attention.py")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 if a bug was missed, a correct model failed a check, or a process died."""
    options = parse(arguments)
    table = options.report or options.out / f"{fingerprint()}.jsonl"
    if not options.report:
        tasks = [task for task in plan(options.seeds) if chosen(task, options.only)]
        print(f"{len(tasks)} rows in {table}; delete it to start over", flush=True)
        with interrupted_quietly():
            fill(table, tasks, options.jobs)
    rows = read(table)
    left = [task for task in plan(options.seeds) if tuple(asdict(task).values()) not in rows]
    text, sound = report(list(rows.values()), f"sources {table.stem}, torch {torch.__version__}", left=len(left))
    if options.only:
        print(text)
    else:
        options.markdown.write_text(text, encoding="utf-8")
        if not left and not options.report:
            strength.main([str(table)])
    return 0 if sound else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seeds", type=positive, default=20, help="seeds per correct model (20); a bug has one")
    parser.add_argument("--only", default="", help="only subjects with one of these words in kind or name: 'bug mask'")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "power", help="folder for the tables")
    parser.add_argument("--markdown", type=Path, default=ROOT / "POWER.md", help="report file; not used with --only")
    parser.add_argument("--report", type=Path, metavar="TABLE", help="run nothing, only report on this table")
    options = parser.parse_args(arguments)
    if options.report and not options.report.exists():
        parser.error(f"no such table: {options.report}")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def fingerprint(root: Path = ROOT) -> str:
    """Ten hex digits of a hash of the sources that decide a verdict and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (root / name for name in SOURCES):
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def plan(seeds: int) -> list[Task]:
    """All rows in the order to run them: bugs that show on a CPU, controls seed by seed, then the slow checks."""
    tasks = [Task("bug", name, 0) for name, bug in BUGS.items() if bug.device == "cpu"]
    tasks += [Task("control", name, seed) for seed in range(seeds) for name in CONTROLS]
    return tasks + [Task("control", name, 0, slow=True) for name in CONTROLS]


def chosen(task: Task, only: str) -> bool:
    return not only or any(word in f"{task.kind}:{task.subject}" for word in only.split())


def fill(table: Path, tasks: list[Task], jobs: int) -> None:
    """Runs the tasks missing from the table, `jobs` at a time, and writes each row as soon as it is known.

    A task whose row ended early is run again.
    """
    done = {key for key, row in read(table).items() if not row["ended"]}
    left = [task for task in tasks if tuple(asdict(task).values()) not in done]
    table.parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(jobs)
    with progress(len(tasks), table.stem) as show, open(table, "a+", encoding="utf-8") as file:
        end_partial_line(file)
        show(len(tasks) - len(left))
        for future in as_completed([pool.submit(run, task) for task in left]):
            row = future.result()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            show(1, row)


def end_partial_line(file: TextIO) -> None:
    """Ends the last line, which a run that was killed may have left unfinished."""
    file.seek(0)
    text = file.read()
    if text and not text.endswith("\n"):
        file.write("\n")


def read(table: Path) -> dict[Key, dict[str, Any]]:
    """The last row of each task; unfinished lines are left out."""
    rows: dict[Key, dict[str, Any]] = {}
    for line in table.read_text(encoding="utf-8").splitlines() if table.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["kind"], row["subject"], row["seed"], row["slow"]] = row
    return rows


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, none in a pipe; problems are printed in both as soon as they are known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, disable=not sys.stdout.isatty())
    task = bar.add_task(title, total=total)

    def show(steps: int, row: dict[str, Any] | None = None) -> None:
        bar.update(task, advance=steps, description=row["subject"] if row else title)
        for line in problems(row) if row else []:
            print(line, flush=True)

    with bar:
        yield show


@contextmanager
def interrupted_quietly() -> Iterator[None]:
    """Exits on Ctrl-C without a traceback; processes still running end at their next message."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
