"""Judges one subject in a process of its own, so that a crash or a hang ends only that subject's row.

The fork server imports this module once, with the libraries that the subjects need; each process is forked from it.
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

import tests.variants_of_attention  # noqa: F401
from tests.controls import CONTROLS
from transformer_checks.checks import all_checks
from transformer_checks.checks.bugs import all_bugs
from transformer_checks.checks.run.order import Check, check_id
from transformer_checks.checks.run.verdict import Verdict, judge
from transformer_checks.checks.subject import Subject

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # these libraries warn when they are imported
    import transformers  # noqa: F401
    import x_transformers  # noqa: F401

TIME_LIMIT = 1200.0  # seconds per subject; about a dozen are enough on an idle machine
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

# Imported before the run starts: a process must not import a file that was edited in the meantime.
BUGS, CHECKS = all_bugs(), all_checks()


@dataclass(frozen=True)
class Task:
    """One row of the table: a bug or a control and its seed, judged by the fast or by the slow checks."""

    kind: str  # "bug" or "control"
    subject: str
    seed: int
    slow: bool = False


def run(task: Task) -> dict[str, Any]:
    """The row of a task: its verdicts, and in `ended` what stopped it early ("" if every check was judged)."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=examine, args=(task, sender), daemon=True)
    start = time.monotonic()
    process.start()
    sender.close()
    verdicts, ended = _receive(receiver, start + TIME_LIMIT)
    timed_out = ended.startswith("timed out")
    if timed_out:
        process.kill()
    process.join()
    if ended and not timed_out:
        ended = f"{_exit(process.exitcode)} {ended}"
    seconds = round(time.monotonic() - start, 2)
    return {**asdict(task), "named": named(task), "seconds": seconds, "ended": ended, "verdicts": verdicts}


def _receive(receiver: Connection, deadline: float) -> tuple[list[dict[str, Any]], str]:
    """The verdicts that the process sends, and which check it was in when it stopped; "" if it finished."""
    verdicts: list[dict[str, Any]] = []
    place = "before its first check"
    while True:
        if not receiver.poll(max(0.0, deadline - time.monotonic())):
            return verdicts, f"timed out after {TIME_LIMIT:g} s {place}"
        try:
            message = receiver.recv()
        except EOFError:
            return verdicts, place
        if message is None:
            return verdicts, ""
        if isinstance(message, str):
            place = f"in {message}"
        else:
            verdicts.append(message)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def examine(task: Task, parent: Connection) -> None:
    """Runs in the child process: sends each check's name and verdict, and None at the end."""
    silence()
    torch.set_num_threads(1)
    gc.freeze()  # keeps the garbage collector from scanning what the fork server imported
    judge_all(task, parent.send)
    parent.send(None)


def judge_all(task: Task, send: Callable[[str | dict[str, Any]], None]) -> None:
    """Judges every check of a task; sends its name before it starts, then its verdict."""
    subject, earlier = make(task), dict[str, Verdict]()
    for check in checks_of(task):
        send(check_id(check))
        verdict = judge(check, subject, earlier)
        earlier[verdict.check] = verdict
        send(brief(verdict))


def silence() -> None:
    """Discards output and warnings of the libraries, which would break up the progress bar."""
    warnings.simplefilter("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def make(task: Task) -> Subject:
    if task.kind == "bug":
        return BUGS[task.subject].subject(seed=task.seed)
    return CONTROLS[task.subject](seed=task.seed)


def named(task: Task) -> list[str]:
    """The checks that must fail on a bug; none for a control."""
    return list(BUGS[task.subject].caught_by) if task.kind == "bug" else []


def checks_of(task: Task) -> list[Check]:
    """The slow checks, or the fast ones with those slow ones that must fail on this bug."""
    if task.slow:
        return [check for check in CHECKS if hasattr(check, "slow")]
    return [check for check in CHECKS if not hasattr(check, "slow") or check_id(check) in named(task)]


def brief(verdict: Verdict) -> dict[str, Any]:
    """What the table keeps of a verdict: the outcome, and unless it passed the message, place and likely causes."""
    kept: dict[str, Any] = {"check": verdict.check, "outcome": verdict.outcome, "seconds": verdict.seconds}
    if verdict.outcome != "passed":
        kept["says"] = verdict.says[:1000]
    if verdict.outcome in ("failed", "error"):
        kept["likely"] = list(verdict.likely)
        kept["where"] = str(verdict.where or "")
    return kept
