"""Compares two sets of verdicts: which outcome, place or likely cause changed.

`python -m power.same BEFORE.jsonl AFTER.jsonl` reads two files, each either written by `--verdicts` or a table of
`make power`, prints every difference, and exits with 0 only if there is none. Verdicts are paired by subject and check,
so name the subjects alike in both runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str]  # subject and check


@dataclass(frozen=True)
class Verdict:
    """What is compared of a verdict. Messages, numbers, files, lines and times may differ."""

    outcome: str
    module: str = ""  # of `where`
    likely: frozenset[str] = frozenset()

    @classmethod
    def of(cls, record: Record) -> Verdict:
        where = record.get("where") or ""
        # A table of `make power` holds the place as text: module (type, file:line).
        module = where["module"] if isinstance(where, dict) else where.partition(" (")[0]
        return cls(record["outcome"], module, frozenset(record.get("likely", ())))


def verdicts(file: Path) -> dict[Key, Verdict]:
    """The verdicts of a file by subject and check; of a subject judged more than once, the last ones."""
    rows: dict[tuple[Any, ...], Record] = {}
    found: dict[Key, Verdict] = {}
    for record in records(file):
        if "verdicts" in record:
            rows[record["kind"], record["subject"], record["seed"], record["slow"]] = record
        elif "outcome" in record:
            found[record["subject"], record["check"]] = Verdict.of(record)
    for (kind, name, seed, _), row in rows.items():
        subject = f"{kind}:{name}" + (f" seed {seed}" if seed else "")
        found |= {(subject, verdict["check"]): Verdict.of(verdict) for verdict in row["verdicts"]}
    return found


def records(file: Path) -> Iterator[Record]:
    """The JSON objects of a file, a line each; a line that a killed run left unfinished is left out."""
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def difference(before: Verdict | None, after: Verdict | None) -> str:
    """What changed between two verdicts of the same check; "" if they are equal. None stands for a missing verdict."""
    if before is None:
        return f"only in AFTER: {after.outcome}" if after else ""
    if after is None:
        return f"only in BEFORE: {before.outcome}"
    changed = {
        "outcome": (before.outcome, after.outcome),
        "place": (before.module, after.module),
        "likely": (", ".join(sorted(before.likely)), ", ".join(sorted(after.likely))),
    }
    return "; ".join(f"{name}: {old or 'none'} → {new or 'none'}" for name, (old, new) in changed.items() if old != new)


def compare(before: dict[Key, Verdict], after: dict[Key, Verdict]) -> list[str]:
    """One line per verdict that differs or is missing on one side."""
    pairs = {key: difference(before.get(key), after.get(key)) for key in (before | after)}
    return [f"{subject} {check}: {changed}" for (subject, check), changed in pairs.items() if changed]


def number(things: Collection[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.same", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE.jsonl", help="a --verdicts file or a table of make power")
    parser.add_argument("after", type=Path, metavar="AFTER.jsonl", help="the same, later")
    options = parser.parse_args(arguments)
    found = []
    for file in (options.before, options.after):
        if not file.is_file():
            parser.error(f"no such file: {file}")
        found.append(verdicts(file))
        if not found[-1]:
            parser.error(f"{file} holds no verdicts")
    changed = compare(*found)
    every = found[0].keys() | found[1].keys()
    counts = f"{number(every, 'verdict')} of {number({subject for subject, _ in every}, 'subject')}"
    differ = f"{len(changed)} {'differs' if len(changed) == 1 else 'differ'}"
    print("\n".join([*changed, f"{counts}: {differ if changed else 'all equal'}"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
