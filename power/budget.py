"""How many of the known bugs a budget catches: `python -m power.budget 3` judges each as `--budget 3` would.

Each is judged in a process of its own, forked from one that has imported torch and nothing of the checks. `--start N`
also runs whole commands on N of them, start included. Processor seconds, so that a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
from statistics import median
from typing import Any

import torch

from transformer_checks.checks.run.order import all_listed
from transformer_checks.checks.run.session import Session
from transformer_checks.checks.run.strength import FILE, in_order, processor_seconds
from transformer_checks.checks.run.subjects import subject_of

SEED = 0


def judged(bug: str, budget: float) -> dict[str, Any]:
    """Which checks failed on a bug within a budget, how many had a verdict, and the seconds that they took."""
    torch.set_num_threads(1)
    subject = subject_of(f"bug:{bug}", seed=SEED)
    session = Session(subject.name, budget=budget)
    session.choose(all_listed().values())
    begun = processor_seconds()
    verdicts = [session.judge(check, subject) for check in in_order(all_listed().values())]
    failed = [verdict.check for verdict in verdicts if verdict.outcome == "failed"]
    ran = sum("budget" not in verdict.evidence for verdict in verdicts)
    return dict(bug=bug, failed=failed, ran=ran, seconds=processor_seconds() - begun)


def whole(bug: str, budget: float) -> float:
    """Processor seconds of a whole run of the command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--model", f"bug:{bug}", "--seed", str(SEED), "--budget", str(budget), "-p", "no:cacheprovider"]
    subprocess.run([sys.executable, "-m", "pytest", "--noconftest", *options], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m power.budget", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--bugs", type=int, metavar="N", help="judge a sample of N (all)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="time N whole commands too (0)")
    options = parser.parse_args(arguments)
    every = json.loads(FILE.read_text(encoding="utf-8"))["bugs"]
    bugs = random.Random(SEED).sample(every, min(options.bugs or len(every), len(every)))
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(judged, (bug, options.seconds)) for bug in bugs]
    caught = sum(bool(row["failed"]) for row in rows)
    seconds = [row["seconds"] for row in rows]
    print(f"{options.seconds:g} s catch {caught} of {len(rows)} known bugs ({100 * caught / len(rows):.0f} %), "
          f"with {median(row['ran'] for row in rows):.0f} of {len(all_listed())} checks; the checks took "
          f"{median(seconds):.2f} s (median), {max(seconds):.2f} s (most)")  # fmt: skip
    if missed := [row["bug"] for row in rows if not row["failed"]]:
        print(f"missed: {', '.join(missed)}")
    if options.start:
        took = [whole(bug, options.seconds) for bug in bugs[: options.start]]
        print(f"start included: {median(took):.2f} s (median), {max(took):.2f} s (most) of {len(took)} commands")
    return 0


if __name__ == "__main__":
    sys.exit(main())
