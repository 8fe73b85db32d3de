"""Writes POWER.md from the rows of `make power`: bugs caught, by which checks, and false alarms on correct models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
DECIDED = ("passed", "failed")
BROKEN = ("failed", "error")


def report(rows: list[Row], of_what: str, *, left: int = 0) -> tuple[str, bool]:
    """The report, and whether there are no problems: every bug caught by its checks, no false alarm, nothing died.

    `of_what` names the sources that were judged, `left` is the number of rows not run yet.
    """
    bugs, controls = of_kind(rows, "bug"), of_kind(rows, "control")
    found = [line for row in rows for line in problems(row)]
    parts = [
        "# Power",
        f"Results of every check on every known bug and on correct models, measured by `make power` "
        f"({of_what}; {len(rows)} rows{f', {left} more not run yet' if left else ''}).",
        *(of_bugs(bugs) if bugs else []),
        *(of_controls(controls) if controls else []),
        *(["## Problems", *listed(found)] if found else []),
        *(by_check(bugs, controls) if bugs or controls else []),
    ]
    return "\n\n".join(parts) + "\n", not found


def problems(row: Row) -> list[str]:
    """What is wrong in a row, a line each: an early end, a false alarm, a bug that was missed."""
    name = f"{row['kind']}:{row['subject']} seed {row['seed']}"
    found = [f"{name}: {row['ended']}"] if row["ended"] else []
    if row["kind"] == "control":
        alarms = [v for v in row["verdicts"] if v["outcome"] in BROKEN]
        return found + [f"{name}: false alarm: {v['check']} {v['outcome']}: {v['says']}" for v in alarms]
    if not caught(row):
        found.append(f"{name}: no check failed")
    outcomes = {v["check"]: v["outcome"] for v in row["verdicts"]}
    missed = [check for check in row["named"] if outcomes.get(check) in ("passed", "not_applicable", "error")]
    return found + [f"{name}: {check} should fail, outcome: {outcomes[check]}" for check in missed]


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def failed(row: Row) -> list[str]:
    """The checks that failed. An error does not count as a catch, because any broken model can crash."""
    return [v["check"] for v in row["verdicts"] if v["outcome"] == "failed"]


def caught(row: Row, theme: str = "") -> bool:
    """Whether a check failed: any check, or one of this theme."""
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
        "A check whose prerequisite failed is blocked and does not count as a catch: one mistake should give one "
        "finding. The columns count the bugs that a theme catches, catches first, and is the only one to catch.",
        table("| theme | caught | caught first | caught by no other theme |", lines),
    ]


def of_controls(controls: list[Row]) -> list[str]:
    names, seeds = {row["subject"] for row in controls}, Counter(row["subject"] for row in controls if not row["slow"])
    outcomes = Counter(v["outcome"] for row in controls for v in row["verdicts"])
    accused = sum(any(v["outcome"] in BROKEN for v in row["verdicts"]) for row in controls)
    most, least = max(seeds.values(), default=0), min(seeds.values(), default=0)
    often = f"{least} to {most} seeds" if most != least else "1 seed" if most == 1 else f"{most} seeds"
    return [
        "## Controls",
        f"Correct models: {len(names)}, {often} each. Of their verdicts {outcomes['passed']} are passed, "
        f"{outcomes['not_applicable']} not applicable, {outcomes['failed']} failed and {outcomes['error']} error. "
        f"A failure or an error here is a false alarm: {accused} of {len(controls)} rows have one.",
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
    head = "| check | bugs caught | caught by no other check | applies to controls | false alarms |"
    return ["## Check by check", table(head, lines)]


def decided(outcomes: Counter[str]) -> str:
    """The share of verdicts in which the check applied and could decide."""
    return share(sum(outcomes[outcome] for outcome in DECIDED), sum(outcomes.values()))


def in_order(rows: list[Row]) -> list[str]:
    """The themes in the order in which they run."""
    return list(dict.fromkeys(theme_of(v["check"]) for row in rows for v in row["verdicts"]))


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def table(head: str, lines: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---" + "|---:" * (columns - 1) + "|", *lines])


def listed(lines: list[str]) -> list[str]:
    return ["\n".join(f"- {' '.join(line.split())[:400]}" for line in lines)]
