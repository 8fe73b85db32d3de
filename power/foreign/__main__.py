"""`python -m power.foreign`: which of the known bugs are caught in foreign code, by which check, and whether by name.

Each bug in each form is judged in a process of its own. The rows are JSON lines; a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from power.mutants import bounded

from . import FORMS
from .edits import all_edits
from .measure import RESULTS, Case, forms_of, judged

SECONDS = 180.0  # for one bug in one form; a full run takes about ten
DRAWN = 3  # forms for each bug


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    pairs = chosen(options.start, options.bugs, options.forms, options.only)
    cases = [Case(bug, form, options.seed, not options.undeclared) for bug, form in pairs]
    print(report(measured(cases, options.out)))
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m power.foreign", description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=int, default=0, help="the first bug, by its place in the drawn order")
    parser.add_argument("--bugs", type=int, default=None, help="how many bugs; all by default")
    parser.add_argument("--forms", type=int, default=DRAWN, help="how many forms of each bug, drawn; 0 is all")
    parser.add_argument("--only", default="", help="bugs by id, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the checks")
    parser.add_argument("--undeclared", action="store_true", help="without --spec, as most users run the checks")
    parser.add_argument("--out", type=Path, default=Path("out/foreign.jsonl"), help="where the rows go")
    return parser.parse_args(arguments)


def chosen(start: int, count: int | None, forms: int, only: str = "") -> list[tuple[str, str]]:
    """Pairs of bug and form. The order of the bugs is drawn, so that the first are a sample; so are their forms."""
    drawn_order = random.Random(0).sample(list(all_edits()), len(all_edits()))
    bugs = only.split(",") if only else drawn_order[start : None if count is None else start + count]
    pairs = []
    for bug in bugs:
        fitting = forms_of(bug)
        drawn = random.Random(bug).sample(fitting, min(forms, len(fitting))) if forms else fitting
        pairs += [(bug, form) for form in fitting if form in drawn]
    return pairs


def measured(cases: list[Case], out: Path) -> list[dict[str, Any]]:
    """The rows of these cases: those that the file `out` has not yet are judged and added to it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    for row in map(json.loads, out.read_text(encoding="utf-8").splitlines() if out.exists() else ()):
        known[Case(row["bug"], row["form"], row["seed"], row["declared"])] = row
    with open(out, "a", encoding="utf-8") as file:
        for case in cases:
            if case not in known:
                row = bounded(judged, case, seconds=SECONDS)
                if row["result"] not in RESULTS:  # the process crashed or was too slow
                    row = {**asdict(case), "check": "", "likely": False, **row}
                known[case] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    return [known[case] for case in cases]


def report(rows: list[dict[str, Any]]) -> str:
    """A table of bugs and forms, what was caught how, and what was missed."""
    total, results = len(rows), Counter(row["result"] for row in rows)
    caught = [row for row in rows if row["result"] in RESULTS[:3]]
    named = sum(row["likely"] for row in caught)
    lines = [
        f"{len({row['bug'] for row in rows})} bugs in {len({row['form'] for row in rows})} forms, {total} files: "
        f"{len(caught)} caught ({len(caught) / max(total, 1):.1%}), {named} of them by name (among the likely bugs)",
        *(f"  {result}: {count}" for result, count in results.most_common()),
        *(f"  {form}: {_share([row for row in rows if row['form'] == form])} caught" for form in FORMS),
        "",
        f"| bug | {' | '.join(FORMS)} |",
        f"|---{'|---' * len(FORMS)}|",
    ]
    cells = {(row["bug"], row["form"]): _cell(row) for row in rows}
    lines += [
        f"| {bug} | {' | '.join(cells.get((bug, form), '') for form in FORMS)} |"
        for bug in dict.fromkeys(row["bug"] for row in rows)
    ]
    return "\n".join(lines)


def _share(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['result'] in RESULTS[:3] for row in rows)} of {len(rows)}"


def _cell(row: dict[str, Any]) -> str:
    """The check that caught it, with a star if it named the bug; in capitals what did not."""
    if row["result"] not in RESULTS[:3]:
        return str(row["result"]).upper()
    name = row["check"].partition(".")[2].removeprefix("check_")
    return f"{name}{'*' * row['likely']}"


if __name__ == "__main__":
    sys.exit(main())
