"""POWER.md from the rows of the table: what is caught and by what, who is accused falsely. Pure: rows in, text out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
DECIDED = ("passed", "failed")
BROKEN = ("failed", "error")


def report(rows: list[Row], of_what: str, *, left: int = 0) -> tuple[str, bool]:
    """The report, and whether every bug was caught by what it names and no control accused; `left` rows are not run."""
    bugs, controls = of_kind(rows, "bug"), of_kind(rows, "control")
    amiss = [line for row in rows for line in wrong(row)]
    parts = [
        "# Power",
        f"What every check says of every known bug and of correct models: `make power` "
        f"({of_what}; {len(rows)} rows{f', {left} more are not yet run' if left else ''}).",
        *(of_bugs(bugs) if bugs else []),
        *(of_controls(controls) if controls else []),
        *(["## Amiss", *listed(amiss)] if amiss else []),
        *(by_check(bugs, controls) if bugs or controls else []),
    ]
    return "\n\n".join(parts) + "\n", not amiss


def wrong(row: Row) -> list[str]:
    """A line for each thing that should not be in this row."""
    who = f"{row['kind']}:{row['subject']} seed {row['seed']}"
    found = [f"{who}: {row['ended']}"] if row["ended"] else []
    if row["kind"] == "control":
        return found + [
            f"{who}: {v['check']} {v['outcome']}: {v['says']}" for v in row["verdicts"] if v["outcome"] in BROKEN
        ]
    outcomes = {v["check"]: v["outcome"] for v in row["verdicts"]}
    missed = [name for name in row["named"] if outcomes.get(name, "none") in ("passed", "not_applicable", "error")]
    if not caught(row):
        found.append(f"{who}: caught by no check")
    return found + [f"{who}: {name} {outcomes[name]}, and is named to catch it" for name in missed]


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def failed(row: Row) -> list[str]:
    """The checks that failed; an error counts as no catch, for anything can crash."""
    return [v["check"] for v in row["verdicts"] if v["outcome"] == "failed"]


def caught(row: Row, theme: str = "") -> bool:
    return any(theme in ("", theme_of(check)) for check in failed(row))


def theme_of(check: str) -> str:
    return check.partition(".")[0].removeprefix("check_")


def of_bugs(bugs: list[Row]) -> list[str]:
    total, all_caught = len(bugs), sum(map(caught, bugs))
    sanity = [row["subject"] for row in bugs if caught(row, "sanity")]
    first = Counter(theme_of(failed(row)[0]) for row in bugs if caught(row))
    any_of = Counter(theme for row in bugs for theme in {theme_of(check) for check in failed(row)})
    alone = Counter(themes.pop() for row in bugs if len(themes := {theme_of(check) for check in failed(row)}) == 1)
    lines = [f"| {theme} | {any_of[theme]} | {first[theme]} | {alone[theme]} |" for theme in in_order(bugs)]
    return [
        "## Bugs",
        f"{all_caught} of {total} known bugs are caught. The two sanity checks alone catch {len(sanity)} "
        f"({share(len(sanity), total)}).",
        "A check whose prerequisite failed is blocked and counts as no catch: one mistake is to give one finding.",
        table("| theme | catches | is the first to | is the only one to |", lines),
    ]


def of_controls(controls: list[Row]) -> list[str]:
    names, seeds = {row["subject"] for row in controls}, Counter(row["subject"] for row in controls if not row["slow"])
    outcomes = Counter(v["outcome"] for row in controls for v in row["verdicts"])
    accused = sum(any(v["outcome"] in BROKEN for v in row["verdicts"]) for row in controls)
    most, least = max(seeds.values(), default=0), min(seeds.values(), default=0)
    often = f"{least} to {most} seeds" if most != least else "1 seed" if most == 1 else f"{most} seeds"
    return [
        "## Controls",
        f"{len(names)} correct models, {often} each: {outcomes['passed']} verdicts passed, "
        f"{outcomes['not_applicable']} were not applicable, {outcomes['failed']} failed and {outcomes['error']} were "
        f"errors, of {accused} of {len(controls)} rows. A failure here is a false alarm.",
    ]


def by_check(bugs: list[Row], controls: list[Row]) -> list[str]:
    catches = Counter(check for row in bugs for check in failed(row))
    alone = Counter(failed(row)[0] for row in bugs if len(failed(row)) == 1)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for row in controls:
        for verdict in row["verdicts"]:
            outcomes[verdict["check"]][verdict["outcome"]] += 1
    checks = dict.fromkeys(v["check"] for row in (*bugs, *controls) for v in row["verdicts"])
    lines = [
        f"| {check.removeprefix('check_')} | {catches[check]} | {alone[check]} | {decided(outcomes[check])} "
        f"| {sum(outcomes[check][bad] for bad in BROKEN)} |"
        for check in checks
    ]
    head = "| check | bugs caught | alone | decides on controls | false alarms |"
    return ["## Check by check", table(head, lines)]


def decided(outcomes: Counter[str]) -> str:
    return share(sum(outcomes[outcome] for outcome in DECIDED), sum(outcomes.values()))


def in_order(rows: list[Row]) -> list[str]:
    """The themes as they run."""
    return list(dict.fromkeys(theme_of(v["check"]) for row in rows for v in row["verdicts"]))


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def table(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---" + "|---:" * (columns - 1) + "|", *lines])


def listed(lines: list[str]) -> list[str]:
    return ["\n".join(f"- {' '.join(line.split())[:400]}" for line in lines)]
