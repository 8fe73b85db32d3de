"""One subject against every check, in a process of its own: its end, whatever it is, costs no other subject anything.

Imported once by the server from which these processes are forked, hence the imports that only subjects need.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo

import tests.variants  # noqa: F401
from tests.controls import CONTROLS
from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.order import check_id
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the libraries' own
    import transformers  # noqa: F401
    import x_transformers  # noqa: F401

PATIENCE = 1200.0  # seconds that one subject may take; a dozen do, on a machine with nothing else to do
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

# All that a child must not import in the middle of a run, when its file may have become another.
BUGS, CHECKS = all_bugs(), all_checks()


@dataclass(frozen=True)
class Task:
    """One row of the table: a bug or a control, with a seed, against the fast checks or the slow ones."""

    kind: str  # "bug" or "control"
    subject: str
    seed: int
    slow: bool = False


def run(task: Task) -> dict[str, Any]:
    """The task's row: its verdicts, and in `ended` why there are no more; "" if every check was judged."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=examine, args=(task, theirs), daemon=True)
    start = time.monotonic()
    process.start()
    theirs.close()
    verdicts, ended = _listen(ours, start + PATIENCE)
    if ended.startswith("stopped"):
        process.kill()
    process.join()
    if ended and not ended.startswith("stopped"):
        ended = f"{_end(process.exitcode)} {ended}"
    seconds = round(time.monotonic() - start, 2)
    return {**asdict(task), "named": named(task), "seconds": seconds, "ended": ended, "verdicts": verdicts}


def _listen(ours: Connection, until: float) -> tuple[list[dict[str, Any]], str]:
    """The verdicts that the process sends, and where it was when it fell silent; "" after its last word."""
    verdicts: list[dict[str, Any]] = []
    at = "before its first check"
    while True:
        if not ours.poll(max(0.0, until - time.monotonic())):
            return verdicts, f"stopped after {PATIENCE:g} s {at}"
        try:
            said = ours.recv()
        except EOFError:
            return verdicts, at
        if said is None:
            return verdicts, ""
        if isinstance(said, str):
            at = f"in {said}"
        else:
            verdicts.append(said)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended itself with exit code {code}"


def examine(task: Task, parent: Connection) -> None:
    """In the child."""
    silence()
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported: each collection would look through all of it
    judge_all(task, parent.send)
    parent.send(None)


def judge_all(task: Task, say: Callable[[Any], None]) -> None:
    """Says the name of each check as it starts, then its verdict."""
    subject, earlier = make(task), dict[str, Verdict]()
    for check in checks_of(task):
        say(check_id(check))
        verdict = judge(check, subject, earlier)
        earlier[verdict.check] = verdict
        say(brief(verdict))


def silence() -> None:
    """What libraries print and warn of would go through the progress bar."""
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def make(task: Task) -> Subject:
    if task.kind == "bug":
        return BUGS[task.subject].subject(seed=task.seed)
    return CONTROLS[task.subject](seed=task.seed)


def named(task: Task) -> list[str]:
    """The checks that must fail on a bug."""
    return list(BUGS[task.subject].caught_by) if task.kind == "bug" else []


def checks_of(task: Task) -> list[Callable]:
    """The fast checks, or the slow ones; with the fast ones also what a bug names."""
    if task.slow:
        return [check for check in CHECKS if hasattr(check, "slow")]
    return [check for check in CHECKS if not hasattr(check, "slow") or check_id(check) in named(task)]


def brief(verdict: Verdict) -> dict[str, Any]:
    """What the table keeps of a verdict: enough to count, to judge by hand and to tell bugs apart."""
    kept: dict[str, Any] = {"check": verdict.check, "outcome": verdict.outcome, "seconds": verdict.seconds}
    if verdict.outcome != "passed":
        kept["says"] = verdict.says[:1000]
    if verdict.outcome in ("failed", "error"):
        kept["likely"] = list(verdict.likely)
        kept["where"] = str(verdict.where or "")
    return kept
