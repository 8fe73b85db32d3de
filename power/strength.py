"""Writes checks/run/strength.json: what each check takes and catches, in the order in which checks are to run.

`python -m power.strength TABLE.jsonl…` reads tables of `make power` or files written by `--verdicts` over bugs, and
over the reference for the seconds; `make power` calls it at its end. `--order` measures nothing: it only puts the
checks of the file in order again, after one was added or needs another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from power.report import failed
from power.same import records
from transformer_checks.checks import all_checks
from transformer_checks.checks.run import REFERENCE
from transformer_checks.checks.run.order import check_id
from transformer_checks.checks.run.strength import FILE, Strength, strengths

Row = dict[str, Any]
RAN = ("passed", "failed", "error")
LEAST = 0.001  # seconds that any check costs
Needs = Mapping[str, Collection[str]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.strength", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE.jsonl", help="tables of make power, or verdicts")
    parser.add_argument("--order", action="store_true", help="measure nothing, only put the checks in order again")
    options = parser.parse_args(arguments)
    if bool(options.tables) == options.order:
        parser.error("give tables, or --order without any")
    if options.order:
        bugs, measured = json.loads(FILE.read_text(encoding="utf-8"))["bugs"], dict(strengths())
    else:
        bugs, measured = measure([row for table in options.tables for row in rows(table)])
    write(bugs, measured)
    print(f"{FILE}: {len(measured)} checks, {len(bugs)} known bugs")
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


def measure(table: Iterable[Row]) -> tuple[list[str], dict[str, Strength]]:
    """The known bugs, and by check which of them it catches and its seconds.

    The seconds are the median over the reference; over the bugs for a check that the reference gives nothing to do.
    """
    table = [row for row in table if row["kind"] == "bug" or (row["kind"], row["subject"]) == ("", REFERENCE)]
    bugs = sorted({row["subject"] for row in table if row["kind"] == "bug"})
    catches: dict[str, set[int]] = defaultdict(set)
    seconds: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for row in table:
        is_bug = row["kind"] == "bug"
        for check in failed(row) if is_bug else ():
            catches[check].add(bugs.index(row["subject"]))
        for verdict in row["verdicts"]:
            if verdict["outcome"] in RAN:
                seconds[verdict["check"]][is_bug].append(verdict["seconds"])
            else:
                seconds[verdict["check"]]  # it is known, even if it never ran
    return bugs, {
        check: Strength(round(median(took[False] or took[True] or [0.0]), 4), frozenset(catches[check]))
        for check, took in seconds.items()
        if check in needs() and check not in slow()
    }


def needs() -> Needs:
    """The checks that each check needs."""
    return {check_id(check): getattr(check, "needs", ()) for check in all_checks()}


def slow() -> set[str]:
    return {check_id(check) for check in all_checks() if hasattr(check, "slow")}


def in_order(measured: Mapping[str, Strength], needs: Needs) -> list[str]:
    """Greedy: next is always what catches the most bugs not caught yet per second, with what it needs and has not run.

    A check of which nothing was measured only comes where another needs it.
    """
    order: list[str] = []
    caught: set[int] = set()
    left = [check for check in needs if check in measured]
    while left:
        ways = {check: _with_needs(check, needs, order) for check in left}
        best = max(left, key=lambda check: _worth(ways[check], measured, caught))
        for check in ways[best]:
            order.append(check)
            caught |= measured[check].catches if check in measured else set()
        left = [check for check in left if check not in order]
    return order


def _with_needs(check: str, needs: Needs, done: Collection[str]) -> list[str]:
    """The check behind all that it needs, directly or not, and that is not done."""
    found: list[str] = []
    for needed in needs[check]:
        found += [one for one in _with_needs(needed, needs, done) if one not in found] if needed not in done else []
    return [*found, check]


def _worth(way: Collection[str], measured: Mapping[str, Strength], caught: Collection[int]) -> tuple[float, float]:
    """New bugs per second; among those that catch nothing new, bugs per second."""
    known = [measured[check] for check in way if check in measured]
    seconds = sum(max(strength.seconds, LEAST) for strength in known) or LEAST
    bugs = frozenset[int]().union(*(strength.catches for strength in known))
    return len(bugs.difference(caught)) / seconds, len(bugs) / seconds


def write(bugs: list[str], measured: Mapping[str, Strength], file: Path = FILE) -> None:
    """A line per check: its seconds and, by their numbers, the bugs that it catches."""
    lines = []
    for check in in_order(measured, needs()):
        strength = measured.get(check, Strength(0.0, frozenset()))
        lines.append(f"  {json.dumps(check)}: {json.dumps([strength.seconds, sorted(strength.catches)])}")
    names = json.dumps(bugs)
    file.write_text(f'{{"bugs": {names},\n"checks": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
