"""Writes checks/run/strength.json: what each check takes and catches, in the order in which checks are to run.

`python -m power.strength TABLE.jsonl…` reads what each check catches from tables of `make power`, or from files that
`--verdicts` wrote over bugs, and measures what it takes on the reference; `make power` calls it at its end. Without a
table, what each check catches stays as it is: for after a check was added or made faster, or needs another. Whatever
the tables say, each check catches the bugs that name it, which tests/test_bugs.py proves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from power.report import failed
from power.same import records
from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run import REFERENCE
from transformer_checks.checks.run import strength as known
from transformer_checks.checks.run.order import all_listed, check_id
from transformer_checks.checks.run.session import EXECUTED, Session
from transformer_checks.checks.run.strength import FILE, LEAST, UNKNOWN, Strength, processor_seconds, strengths

Row = dict[str, Any]
Needs = Mapping[str, Collection[str]]
TIMES = 3  # processes in which the reference is timed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.strength", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE.jsonl", help="tables of make power, or verdicts")
    options = parser.parse_args(arguments)
    bugs, catches, seconds = measured([row for table in options.tables for row in rows(table)])
    if not options.tables:
        bugs = json.loads(FILE.read_text(encoding="utf-8"))["bugs"]
        catches = {check: strength.catches for check, strength in strengths().items()}
        seconds = {check: strength.seconds for check, strength in strengths().items()}
    bugs, catches = with_those_named(bugs, catches)
    seconds |= seconds_on_the_reference()
    checks = {check.id: Strength(round(seconds.get(check.id, 0.0), 4), catches.get(check.id, frozenset()))
              for check in all_listed().values() if not check.slow}  # fmt: skip
    write(bugs, checks)
    print(f"{FILE}: {len(checks)} checks, {len(bugs)} known bugs")
    return 0


def rows(table: Path) -> list[Row]:
    """The rows of a table of `make power`; of a `--verdicts` file, a row per subject."""
    found: list[Row] = []
    loose: dict[str, Row] = {}
    for record in records(table):
        if "verdicts" in record:
            found.append(record)
        elif "outcome" in record:
            kind, _, name = str(record["subject"]).rpartition(":")
            row = loose.setdefault(record["subject"], dict(kind=kind, subject=name, verdicts=[]))
            row["verdicts"].append(record)
    return found + list(loose.values())


def measured(table: Iterable[Row]) -> tuple[list[str], dict[str, frozenset[int]], dict[str, float]]:
    """The known bugs; by check, which of them it catches, by their numbers, and its median seconds over them."""
    table = [row for row in table if row["kind"] == "bug"]
    bugs = sorted({row["subject"] for row in table})
    catches: dict[str, set[int]] = defaultdict(set)
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in table:
        for check in failed(row):
            catches[check].add(bugs.index(row["subject"]))
        for verdict in row["verdicts"]:
            if verdict["outcome"] in EXECUTED:
                seconds[verdict["check"]].append(verdict["seconds"])
    return bugs, {c: frozenset(n) for c, n in catches.items()}, {c: median(took) for c, took in seconds.items()}


def with_those_named(
    bugs: list[str], catches: Mapping[str, frozenset[int]]
) -> tuple[list[str], dict[str, frozenset[int]]]:
    """The same over every known bug, each caught at least by the checks that it names."""
    known_bugs = all_bugs()
    every = sorted(known_bugs)
    named: dict[str, set[str]] = defaultdict(set)
    for check, numbers in catches.items():
        named[check] |= {bugs[number] for number in numbers}
    for bug in known_bugs.values():
        for check in bug.caught_by:
            named[check].add(bug.id)
    return every, {
        check: frozenset(every.index(bug) for bug in found if bug in known_bugs) for check, found in named.items()
    }


def seconds_on_the_reference() -> dict[str, float]:
    """Of each check that runs there: the median over fresh processes, what torch imports on first use included."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(timed) for _ in range(TIMES)]
    return {check: median(run[check] for run in runs) for check in runs[0]}


def timed() -> dict[str, float]:
    """Processor seconds of each check that the reference gives something to do, in the order in which they run."""
    from transformer_checks.checks.run.subjects import subject_of

    subject, session, took = subject_of(), Session(REFERENCE), {}
    for check in known.in_order(all_listed().values()):
        check.load()
        begun = processor_seconds()
        if session.judge(check, subject).outcome in EXECUTED:
            took[check.id] = processor_seconds() - begun
    return took


def needs() -> Needs:
    """The checks that each check needs."""
    return {check_id(check): getattr(check, "needs", ()) for check in all_checks()}


def in_order(checks: Mapping[str, Strength], needs: Needs) -> list[str]:
    """Greedy: next is always what catches the most bugs not caught yet per second, with what it needs and has not run.

    A slow check is not among them, and comes only where another needs it.
    """
    order: list[str] = []
    caught: set[int] = set()
    left = list(checks)
    while left:
        ways = {check: _with_needs(check, needs, order) for check in left}
        best = max(left, key=lambda check: _worth(ways[check], checks, caught))
        for check in ways[best]:
            order.append(check)
            caught |= checks.get(check, UNKNOWN).catches
        left = [check for check in left if check not in order]
    return order


def _with_needs(check: str, needs: Needs, done: Collection[str]) -> list[str]:
    """The check behind all that it needs, directly or not, and that is not done."""
    found: list[str] = []
    for needed in needs[check]:
        found += [one for one in _with_needs(needed, needs, done) if one not in found] if needed not in done else []
    return [*found, check]


def _worth(way: Collection[str], checks: Mapping[str, Strength], caught: Collection[int]) -> tuple[float, float]:
    """New bugs per second; among those that catch nothing new, bugs per second."""
    seconds = sum(max(checks.get(check, UNKNOWN).seconds, LEAST) for check in way)
    bugs = frozenset[int]().union(*(checks.get(check, UNKNOWN).catches for check in way))
    return len(bugs.difference(caught)) / seconds, len(bugs) / seconds


def write(bugs: list[str], checks: Mapping[str, Strength], file: Path = FILE) -> None:
    """A line per check: its seconds and, by their numbers, the bugs that it catches."""
    lines = []
    for check in in_order(checks, needs()):
        strength = checks.get(check, UNKNOWN)
        lines.append(f"  {json.dumps(check)}: {json.dumps([strength.seconds, sorted(strength.catches)])}")
    file.write_text(f'{{"bugs": {json.dumps(bugs)},\n"checks": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
