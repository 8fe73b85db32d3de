"""A verdict as text for a terminal or a notebook: what broke, where, why, what to try, how to reproduce it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .paths import shown

WIDTH = 100
REASONS = 8  # why checks said nothing: lines at most


def failure(verdict: Mapping[str, Any], explain: Callable[[str], str] = str) -> str:
    """The whole finding of a failed verdict; `explain` turns a bug's id into what it is."""
    lines = [f"✗ {verdict['check']}", *_field("rule", verdict["rule"])]
    lines += _field("what" if verdict["outcome"] == "failed" else "crash", verdict["says"])
    if verdict.get("example"):
        lines += _field("case", ", ".join(f"{name} = {value}" for name, value in _case(verdict["example"])))
    if verdict.get("where"):
        lines += _field("where", place(verdict["where"]))
    for index, bug in enumerate(verdict.get("likely", ())):
        lines += _field("likely" if index == 0 else "or", explain(bug))
    if verdict.get("advice"):
        lines += _field("try", _sentence(verdict["advice"]))
    lines += _field("again", verdict["reproduce"], wrap=False)
    return "\n".join(lines)


def _case(example: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What was drawn, by name; several values drawn together each by their own."""
    for name, value in example.items():
        yield from value.items() if isinstance(value, Mapping) else [(name, value)]


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a name from code, and a full stop."""
    first = text.partition(" ")[0]
    text = first.capitalize() + text[len(first) :] if first.isalpha() and first.islower() else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _field(name: str, text: str, *, wrap: bool = True) -> list[str]:
    margin = " " * 10
    parts = [line for part in text.splitlines() for line in (textwrap.wrap(part, WIDTH - 10) or [""])]
    parts = parts if wrap else [text]
    return [f"  {name:<8}{part}" if index == 0 else margin + part for index, part in enumerate(parts)]


def place(where: Mapping[str, Any]) -> str:
    """`blocks.0.attention (CausalSelfAttention, model.py:29)`."""
    file = f"{shown(where['file'])}:{where['line']}" if where.get("file") else ""
    inside = ", ".join(part for part in (where.get("type"), file) if part)
    return f"{where['module']} ({inside})" if inside else where["module"]


def weights(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which weight is which: the table that `--spec gpt2:FILE.json` reads."""
    table = next((v["evidence"]["weights"] for v in verdicts if "weights" in v["evidence"]), None)
    if table is None:
        return []
    return ["weights (yours: the reference's):", *json.dumps(table, indent=2).splitlines()]


def totals(summary: Mapping[str, Any]) -> str:
    """`60 passed, 1 failed, 15 not applicable; 61 of 78 checks ran`."""
    names = {"passed": "passed", "failed": "failed", "error": "crashed", "not_applicable": "not applicable"}
    names |= {"skipped": "skipped", "blocked": "blocked"}
    counts = [f"{summary[key]} {name}" for key, name in names.items() if summary[key]]
    return f"{', '.join(counts) or 'nothing ran'}; {summary['executed']} of {summary['total']} checks ran"


def not_looked_at(reasons: Mapping[str, int]) -> list[str]:
    """Why checks said nothing about the model, with the number of checks, most first."""
    if not reasons:
        return []
    first, others = list(reasons.items())[:REASONS], list(reasons.values())[REASONS:]
    lines = [f"not looked at, by {sum(reasons.values())} checks:"]
    lines += [f"{checks:>5}  {_short(reason)}" for reason, checks in first]
    if others:
        lines.append(f"{sum(others):>5}  {len(others)} other reasons, each in its verdict (-v)")
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 2 * WIDTH else f"{text[: 2 * WIDTH - 2]} …"


def left_out(checks: int, budget: float, missed: int, known: int) -> str:
    """What a budget left out: how many checks, and how much of what is known to go wrong only they would find."""
    share = f"{100 * missed / known:.0f} % of the known bugs ({missed} of {known})" if known else "unknown bugs"
    return f"the budget of {budget:g} s left out {checks} checks; only they catch {share}"
